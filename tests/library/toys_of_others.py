"""Small models of other libraries, and data that they can take: what people bring to the library."""

import torch
from torch import Tensor, nn


def vit() -> nn.Module:
    """A ViT of timm: two blocks, 16 wide, two heads."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=10
    )
    model.pretrained_cfg = {"first_conv": "patch_embed.proj", "classifier": "head"}
    return model


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18(num_classes=10)


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=12, num_labels=3,
        )
    )  # fmt: skip


def tokens(seed: int, count: int = 6) -> dict[str, Tensor]:
    """A batch as transformers' collators make them."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(40, (count, 10), generator=draw)
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words[:, 0] % 3}


def digits(count: int = 400) -> tuple[Tensor, Tensor]:
    """Real handwritten digits: float32 in 0 … 1, (count, 64), and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data[:count] / 16, dtype=torch.float32), torch.tensor(data.target[:count])
