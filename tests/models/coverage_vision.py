"""Rows of the table of coverage: every family of torchvision's classification networks, and networks of timm."""

import torch
from coverage_rows import CLASSES, STEPS, Row, numbers
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vgg import VGG, make_layers


def _small_head(make, features, channels):
    """A network of a class that fixes the size of its dense layers, with smaller ones and other features."""
    with torch.device("meta"):
        net = make()
    net.features, net.avgpool = features, nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Sequential(nn.Dropout(), nn.Linear(channels, 16), nn.ReLU(True), nn.Linear(16, CLASSES))
    return net


def _alexnet():
    layers = [
        nn.Conv2d(3, 8, 11, 4, 2),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(True),
    ]
    return _small_head(models.AlexNet, nn.Sequential(*layers), 16)


def _vgg(batch_norm):
    features = make_layers([8, "M", 16, "M"], batch_norm=batch_norm)
    return _small_head(lambda: VGG(nn.Identity(), init_weights=False), features, 16)


def _googlenet():
    # In training it returns its auxiliary heads' logits beside its own, which the likelihood takes.
    return models.GoogLeNet(CLASSES, aux_logits=True, init_weights=False)


def _outside_heads(site, parameter):
    return parameter.dim() > 1 and not site.startswith("aux")


def _convnext():
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], layer_scale=1.0, num_classes=CLASSES)


def _efficientnet(first):
    blocks = [first, MBConvConfig(4, 3, 2, 8, 16, 1, 1.0, 1.0)]
    return EfficientNet(blocks, 0.2, num_classes=CLASSES, last_channel=32)


def _mobilenet_v3():
    blocks = [
        InvertedResidualConfig(8, 3, 16, 8, True, "RE", 2, 1, 1),
        InvertedResidualConfig(8, 3, 16, 16, True, "HS", 2, 1, 1),
    ]
    return MobileNetV3(blocks, 32, CLASSES)


def _regnet(se_ratio=None):
    blocks = BlockParams.from_init_params(depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=se_ratio)
    return RegNet(blocks, num_classes=CLASSES, stem_width=8)


def _swin(**kinds):
    return SwinTransformer([4, 4], 8, [1, 2], [2, 2], [4, 4], num_classes=CLASSES, **kinds)


def _swin_v2():
    return _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def _maxvit():
    return MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, 0.1, num_classes=CLASSES)


def _resnet(block, **settings):
    return ResNet(block, [1, 1, 1, 1], CLASSES, **settings)


def _timm_vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, num_classes=CLASSES, embed_dim=16, depth=2, num_heads=2)


def _timm_mixer():
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(CLASSES, 32, patch_size=8, num_blocks=2, embed_dim=16)


def _timm_resnetv2():
    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2

    norm = lambda channels, **more: GroupNormAct(channels, num_groups=4, **more)  # noqa: E731
    return ResNetV2((1, 1), (16, 32), CLASSES, stem_chs=8, conv_layer=StdConv2d, norm_layer=norm)


def _of(name, build, sites, parameters, own_noise, size=32, group="torchvision", **more):
    return Row(group, name, build, numbers(3, size, size), sites, parameters, own_noise, **more)


ROWS = [
    _of("AlexNet", _alexnet, 4, 4_360, 4, 64),
    _of("VGG", lambda: _vgg(False), 4, 1_672, 4),
    _of("VGG with batch norm", lambda: _vgg(True), 4, 1_672, 4),
    _of("vgg11", lambda: models.vgg11(num_classes=CLASSES), 11, 128_767_680, 11, slow=True),
    _of("ResNet", lambda: _resnet(BasicBlock), 13, 4_901_568, 13),
    _of("ResNeXt", lambda: _resnet(Bottleneck, groups=4, width_per_group=4), 18, 3_354_624, 18),
    _of("Wide ResNet", lambda: _resnet(Bottleneck, width_per_group=16), 18, 3_501_504, 18),
    _of("DenseNet", lambda: models.DenseNet(4, (2, 2), 8, num_classes=CLASSES), 11, 4_296, 11),
    _of("DenseNet, memory_efficient", lambda: models.DenseNet(4, (2, 2), 8, num_classes=CLASSES, memory_efficient=True),
        11, 4_296, 11),
    _of("SqueezeNet", lambda: models.SqueezeNet("1_1", CLASSES), 26, 721_088, 26),
    _of("GoogLeNet", lambda: models.GoogLeNet(CLASSES, aux_logits=False, init_weights=False), 58, 5_588_416, 58),
    _of("GoogLeNet, auxiliary heads left out by select", _googlenet, 58, 5_588_416, 58, select=_outside_heads),
    _of("GoogLeNet, auxiliary heads random", _googlenet, 64, 9_921_984, 64, slow=True,
        refused=dict.fromkeys((*STEPS, "save"), "the data would not train the random parameter")),
    _of("Inception v3", lambda: models.Inception3(CLASSES, aux_logits=False, init_weights=False),
        95, 21_757_280, 95, 75, slow=True),
    _of("ShuffleNet v2", lambda: models.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], CLASSES), 27, 12_736, 27),
    _of("MobileNet v2", lambda: models.MobileNetV2(CLASSES, width_mult=0.1), 53, 82_688, 53),
    _of("MobileNet v3", _mobilenet_v3, 14, 6_360, 14),
    _of("MNASNet", lambda: models.MNASNet(0.1, CLASSES), 53, 108_464, 53),
    _of("EfficientNet", lambda: _efficientnet(MBConvConfig(1, 3, 1, 8, 8, 1, 1.0, 1.0)), 12, 2_176, 12),
    _of("EfficientNet v2", lambda: _efficientnet(FusedMBConvConfig(4, 3, 1, 8, 8, 1)), 10, 4_568, 10),
    _of("RegNet X", _regnet, 17, 11_448, 17),
    _of("RegNet Y", lambda: _regnet(1.0), 25, 14_904, 25),
    _of("ConvNeXt", _convnext, 11, 4_704, 9),
    _of("Vision Transformer", lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES), 12, 7_504, 6),
    _of("vit_b_16", lambda: models.vit_b_16(image_size=32, num_classes=CLASSES), 52, 85_531_392, 26, slow=True),
    _of("Swin Transformer", _swin, 18, 8_150, 13),
    _of("swin_t", lambda: models.swin_t(num_classes=CLASSES), 65, 27_457_050, 49, slow=True),
    _of("Swin Transformer v2", _swin_v2, 24, 14_006, 13),
    _of("MaxViT", _maxvit, 36, 13_108, 32),
    _of("VisionTransformer", _timm_vit, 12, 9_552, 10, group="timm", needs="timm"),
    _of("MlpMixer", _timm_mixer, 10, 7_728, 10, group="timm", needs="timm"),
    _of("ResNetV2 with weight standardization", _timm_resnetv2, 10, 3_640, 1, group="timm", needs="timm"),
]  # fmt: skip
