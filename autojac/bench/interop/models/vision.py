"""Cases of timm, torchvision and monai: images, differentiated in their pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autojac.bench.interop.case import Built, case


def classifier(model: nn.Module, size: int, samples: int = 4, channels: int = 3) -> Built:
    """Return a model of images in evaluation mode, at random images."""
    model = model.eval()
    with torch.no_grad():
        # some heads begin at zero, where there is nothing to differentiate
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Built(model, torch.randn(samples, channels, size, size), model)


def timm_model(name: str, size: int, **options: Any) -> Built:
    import timm

    return classifier(timm.create_model(name, pretrained=False, num_classes=5, **options), size)


@case("timm/vit", trains=True)
def timm_vit() -> Built:
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm_model("vit_tiny_patch16_224", 8, img_size=8, **sizes)


@case("timm/convnext", trains=True)
def convnext() -> Built:
    return timm_model("convnext_atto", 32, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))


@case("timm/resnet", trains=True)
def resnet() -> Built:
    return timm_model("resnet10t", 16, channels=(8, 8, 16, 16), stem_width=8)


@case("timm/mixer", trains=True)
def mixer() -> Built:
    from timm.models.mlp_mixer import MlpMixer

    sizes = {"patch_size": 4, "num_blocks": 2, "embed_dim": 32}
    return classifier(MlpMixer(num_classes=5, img_size=8, drop_path_rate=0.1, **sizes), 8)


@case("timm/efficientnet", trains=True)
def efficientnet() -> Built:
    from timm.layers import SqueezeExcite
    from timm.models._efficientnet_blocks import InvertedResidual

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        InvertedResidual(8, 8, exp_ratio=2.0, se_layer=SqueezeExcite),
        InvertedResidual(8, 16, stride=2, exp_ratio=2.0),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return classifier(model, 16)


@case("timm/swin", trains=True)
def swin() -> Built:
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 2}
    return classifier(SwinTransformer(img_size=16, patch_size=4, num_classes=5, **sizes), 16)


@case("torchvision/resnet", trains=True)
def torchvision_resnet() -> Built:
    from torchvision.models.resnet import BasicBlock

    narrow = nn.Conv2d(3, 8, 3, 2, 1)
    model = nn.Sequential(narrow, BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return classifier(model, 16)


@case("torchvision/vit", trains=True)
def torchvision_vit() -> Built:
    from torchvision.models.vision_transformer import VisionTransformer

    return classifier(VisionTransformer(8, 4, 2, 4, 32, 48, num_classes=5), 8)


@case("monai/unet", trains=True)
def unet() -> Built:
    from monai.networks.nets import UNet

    model = UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8, 8), strides=(2, 2)).eval()
    return Built(lambda x: model(x).mean(dim=(2,)), torch.randn(2, 1, 8, 8), model)


@case("monai/segresnet", trains=True)
def segresnet() -> Built:
    from monai.networks.nets import SegResNet

    net = SegResNet(spatial_dims=2, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,))
    model = net.eval()
    return Built(lambda x: model(x).mean(dim=(2,)), torch.randn(2, 1, 8, 8), model)


@case("monai/dice-loss")
def dice() -> Built:
    from monai.losses import DiceLoss

    loss, target = DiceLoss(sigmoid=True, reduction="none"), (torch.rand(8, 2, 8, 8) > 0.5).float()
    return Built(lambda x: loss(x, target[: len(x)]).flatten(1), torch.randn(8, 2, 8, 8))
