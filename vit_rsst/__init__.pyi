from vit_rsst.library.files import load as load
from vit_rsst.library.files import save as save
from vit_rsst.library.functions import analyze as analyze
from vit_rsst.library.functions import prune as prune
from vit_rsst.library.functions import register_models as register_models
from vit_rsst.library.functions import slim as slim
from vit_rsst.library.pruner import Event as Event
from vit_rsst.library.pruner import Pruner as Pruner

__version__: str
__all__: list[str]
