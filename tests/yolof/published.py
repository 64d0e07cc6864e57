"""The published YOLOF networks, written from their papers and configurations, with their names.

`Detectron2Yolof` has the names of the authors' files, `MmdetYolof` those of MMDetection's.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50

BGR_MEAN = (103.53, 116.28, 123.675)


def randomise(network):
    """Give norms statistics like trained ones, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if "norm" in name or "bn" in name or "downsample.1" in name or ".1." in name:
            if tensor.is_floating_point() and tensor.dim() == 1:
                low, high = (0.5, 1.5) if "weight" in name or "var" in name else (-0.3, 0.3)
                tensor.uniform_(low, high, generator=generator)
        elif name.endswith("bias"):
            tensor.uniform_(-0.2, 0.2, generator=generator)
        elif tensor.dim() == 4 and (tensor.shape[1] == 3 or "_score" in name or "object" in name):
            tensor.mul_(0.05)  # Pixels are 0 to 255, and YOLOF clamps large logits.
    return network.eval()


class _Conv(nn.Conv2d):
    """detectron2's conv, which contains its norm."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, bias=False, **kwargs)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return self.norm(super().forward(x))


class _Block(nn.Module):
    def __init__(self, inputs, middle, outputs, stride, dilation=1):
        super().__init__()
        self.conv1 = _Conv(inputs, middle, 1, stride=stride)
        self.conv2 = _Conv(middle, middle, 3, padding=dilation, dilation=dilation)
        self.conv3 = _Conv(middle, outputs, 1)
        self.shortcut = _Conv(inputs, outputs, 1, stride=stride) if inputs != outputs else None

    def forward(self, x):
        y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class _Backbone(nn.Module):
    def __init__(self, dilation):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = _Conv(3, 64, 7, stride=2, padding=3)
        inputs = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            outputs, last = 256 * 2**stage, stage == 3
            strides = [1 if stage == 0 or (last and dilation > 1) else 2] + [1] * (blocks - 1)
            layers = []
            for stride in strides:
                layers.append(
                    _Block(inputs, outputs // 4, outputs, stride, dilation if last else 1)
                )
                inputs = outputs
            setattr(self, f"res{stage + 2}", nn.Sequential(*layers))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, stride=2, padding=1)
        return self.res5(self.res4(self.res3(self.res2(x))))


def _plain(inputs, outputs, size, dilation=1):
    padding = dilation * (size // 2)
    conv = nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class _Residual(nn.Module):
    def __init__(self, channels, middle, dilation, layer):
        super().__init__()
        self.conv1 = layer(channels, middle, 1)
        self.conv2 = layer(middle, middle, 3, dilation)
        self.conv3 = layer(middle, channels, 1)

    def forward(self, x):
        return x + self.conv3(self.conv2(self.conv1(x)))


class _Encoder(nn.Module):
    def __init__(self, channels, middle, dilations, layer):
        super().__init__()
        self.lateral_conv = nn.Conv2d(2048, channels, 1)
        self.lateral_norm = nn.BatchNorm2d(channels)
        self.fpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.fpn_norm = nn.BatchNorm2d(channels)
        blocks = [_Residual(channels, middle, d, layer) for d in dilations]
        self.dilated_encoder_blocks = nn.Sequential(*blocks)

    def forward(self, x):
        x = self.fpn_norm(self.fpn_conv(self.lateral_norm(self.lateral_conv(x))))
        return self.dilated_encoder_blocks(x)


class _Decoder(nn.Module):
    def __init__(self, channels, classes, anchors, tower):
        super().__init__()
        self.classes = classes
        self.cls_subnet, self.bbox_subnet = tower(channels, 2), tower(channels, 4)
        self.cls_score = nn.Conv2d(channels, anchors * classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        self.object_pred = nn.Conv2d(channels, anchors, 3, padding=1)

    def forward(self, x):
        """Return probabilities (B, A, K) and deltas (B, A, 4), ordered by (y, x, anchor)."""
        scores, boxes = self.cls_subnet(x), self.bbox_subnet(x)
        batch = len(x)
        classes = self.cls_score(scores).view(batch, -1, self.classes, *x.shape[-2:]).sigmoid()
        objects = self.object_pred(boxes)[:, :, None].sigmoid()
        deltas = self.bbox_pred(boxes).view(batch, -1, 4, *x.shape[-2:])
        return tuple(t.permute(0, 3, 4, 1, 2).flatten(1, 3) for t in (classes * objects, deltas))


class Detectron2Yolof(nn.Module):
    """YOLOF-R50 as the authors' code builds it; `dilated` is their DC5."""

    def __init__(self, dilated=False, channels=64, middle=16, classes=80):
        super().__init__()
        dilations, anchors = ((4, 8, 12, 16), 6) if dilated else ((2, 4, 6, 8), 5)
        self.backbone = _Backbone(2 if dilated else 1)
        self.encoder = _Encoder(
            channels, middle, dilations, lambda *sizes: nn.Sequential(*_plain(*sizes))
        )
        self.decoder = _Decoder(
            channels,
            classes,
            anchors,
            lambda c, n: nn.Sequential(*[m for _ in range(n) for m in _plain(c, c, 3)]),
        )
        self.register_buffer("pixel_mean", torch.tensor(BGR_MEAN).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.ones(3, 1, 1))

    def forward(self, rgb):
        bgr = (rgb.flip(1) - self.pixel_mean) / self.pixel_std
        return self.decoder(self.encoder(self.backbone(bgr)))


class _ConvModule(nn.Module):
    """MMDetection's conv, norm and ReLU; a conv before a norm has no bias."""

    def __init__(self, inputs, outputs, size, dilation=1):
        super().__init__()
        padding = dilation * (size // 2)
        self.conv = nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class MmdetYolof(nn.Module):
    """YOLOF-R50-C5 as MMDetection builds it, on torchvision's ResNet with Caffe's strides."""

    def __init__(self, channels=64, middle=16, classes=80):
        super().__init__()
        self.backbone = resnet50()
        self.backbone.avgpool = self.backbone.fc = nn.Identity()
        for stage in (self.backbone.layer2, self.backbone.layer3, self.backbone.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        self.neck = _Encoder(channels, middle, (2, 4, 6, 8), _ConvModule)
        self.bbox_head = _Decoder(
            channels,
            classes,
            5,
            lambda c, n: nn.Sequential(*[_ConvModule(c, c, 3) for _ in range(n)]),
        )

    def forward(self, rgb):
        net, x = self.backbone, rgb.flip(1) - torch.tensor(BGR_MEAN).view(3, 1, 1)
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return self.bbox_head(self.neck(x))
