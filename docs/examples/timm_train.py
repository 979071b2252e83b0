"""timm's train.py, unchanged, with pruning: python timm_train.py STEPS train.py [arguments of train.py].

STEPS are the optimizer steps of the whole training: epochs times updates per epoch.
"""

import runpy
import sys

import timm.optim

import vit_rsst

steps, sys.argv = int(sys.argv[1]), sys.argv[2:]  # train.py sees its own arguments
create = timm.optim.create_optimizer_v2


def create_and_prune(model, *args, **kwargs):
    optimizer = create(model, *args, **kwargs)
    vit_rsst.Pruner(model, optimizer, total_steps=steps, final_sparsity=0.9, rounds=4, on_event=print)
    return optimizer


timm.optim.create_optimizer_v2 = create_and_prune
runpy.run_path(sys.argv[0], run_name="__main__")
