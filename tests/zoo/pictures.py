"""Models of pictures: classification, segmentation, detection, contrastive learning."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import manyhands as mh
from support import real_models
from zoo.case import Samples, case, integer, labelled, normal, recipe


def classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of logits."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return what the model computes from a batch."""
    return model(batch)


@case("transformers", "ViT")
def vit() -> mh.Recipe:
    """Pictures in patches, dropout."""
    return real_models.vit("fp32")


@case("transformers", "CLIP")
def clip() -> mh.Recipe:
    """Two towers, a trained scale of zero dimensions, a loss over all pairs of a micro-batch."""
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shared | {"vocab_size": 97, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=shared | {"image_size": 16, "patch_size": 4}, projection_dim=16)

    def make(generator: Generator) -> dict[str, Tensor]:
        return {
            "input_ids": torch.randint(4, 97, (12,), generator=generator),
            "pixel_values": torch.randn(3, 16, 16, generator=generator),
        }

    return recipe(lambda: CLIPModel(config), lambda model, batch: model(**batch, return_loss=True).loss, Samples(make))


@case("transformers", "Swin")
def swin() -> mh.Recipe:
    """Shifted windows, relative position biases, stochastic depth."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.3,
        num_labels=5,
    )  # fmt: skip
    return recipe(
        lambda: SwinForImageClassification(config),
        lambda model, batch: model(pixel_values=batch[0], labels=batch[1]).loss,
        labelled(3, 16, 16),
    )


@case("torchvision", "ResNet")
def resnet() -> mh.Recipe:
    """Batch norm, with its statistics and a counter."""
    return real_models.resnet("fp32")


@case("torchvision", "LR-ASPP")
def lraspp() -> mh.Recipe:
    """A segmentation head on MobileNetV3: hard swish, squeeze and excitation, features of two depths."""
    import torchvision

    def model() -> nn.Module:
        return torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=3
        )

    def make(generator: Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(3, 32, 32, generator=generator), torch.randint(0, 3, (32, 32), generator=generator)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0])["out"], batch[1])

    return recipe(model, loss, Samples(make))


@case("torchvision", "Faster R-CNN")
def faster_rcnn() -> mh.Recipe:
    """Lists of pictures and dicts of boxes; random choice of proposals; data-dependent shapes; four losses."""
    import torchvision
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    def model() -> nn.Module:
        backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1), torchvision.ops.FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
        )
        backbone.out_channels = 8
        return FasterRCNN(
            backbone, min_size=32, max_size=48, box_detections_per_img=5,
            rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.0,),)),
            box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2),
            box_head=torchvision.models.detection.faster_rcnn.TwoMLPHead(8 * 9, 16),
            box_predictor=torchvision.models.detection.faster_rcnn.FastRCNNPredictor(16, 3),
        )  # fmt: skip

    def make(generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        corner = torch.randint(0, 16, (2, 2), generator=generator).float()
        boxes = torch.cat([corner, corner + torch.randint(6, 16, (2, 2), generator=generator)], 1)
        return torch.rand(3, 32, 32, generator=generator), {
            "boxes": boxes,
            "labels": torch.randint(1, 3, (2,), generator=generator),
        }

    def loss(model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
        return sum(model(*batch).values(), torch.zeros(()))

    return recipe(model, loss, Samples(make), collate=lambda samples: tuple(map(list, zip(*samples, strict=True))))


@case("timm", "EfficientNet")
def efficientnet() -> mh.Recipe:
    """Depthwise convolutions, squeeze and excitation, drop path, batch norm fused with its activation."""
    import timm

    def model() -> nn.Module:
        return timm.create_model("test_efficientnet", pretrained=False, num_classes=5, drop_path_rate=0.3)

    return recipe(model, classification, labelled(3, 32, 32))


@case("timm", "ViT")
def timm_vit() -> mh.Recipe:
    """Class token, layer scale, drop path, patch dropout; mixup draws from numpy's generator in the loss."""
    import timm
    from timm.data.mixup import Mixup
    from timm.loss import SoftTargetCrossEntropy

    def model() -> nn.Module:
        return timm.create_model(
            "test_vit", pretrained=False, num_classes=5, img_size=32, drop_path_rate=0.3, patch_drop_rate=0.25,
            init_values=0.1,
        )  # fmt: skip

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        mixed, targets = Mixup(mixup_alpha=0.5, cutmix_alpha=1.0, num_classes=5)(batch[0].clone(), batch[1])
        return SoftTargetCrossEntropy()(model(mixed), targets)

    return recipe(model, loss, labelled(3, 32, 32))


@case("timm", "ConvNeXt")
def convnext() -> mh.Recipe:
    """Layer norms over channels, layer scale; two parameter groups."""
    import timm

    def optimizer(params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        decayed = [param for _, param in params if param.ndim > 1]
        others = [param for _, param in params if param.ndim <= 1]
        return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])

    return recipe(
        lambda: timm.create_model("test_convnext", pretrained=False, num_classes=5),
        classification,
        labelled(3, 32, 32),
        optimizer=optimizer,
    )


@case("open_clip_torch", "CLIP")
def open_clip() -> mh.Recipe:
    """Causal mask as a buffer, a trained scale, and the loss class of the package."""
    from open_clip import CLIP, ClipLoss

    def model() -> nn.Module:
        return CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 16, "patch_size": 4, "layers": 2, "width": 64, "head_width": 32},
            text_cfg={"context_length": 12, "vocab_size": 97, "width": 32, "heads": 2, "layers": 2},
        )

    def make(generator: Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(3, 16, 16, generator=generator), torch.randint(4, 97, (12,), generator=generator)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return ClipLoss()(*model(*batch))

    return recipe(model, loss, Samples(make))


@case("segmentation-models-pytorch", "U-Net")
def unet() -> mh.Recipe:
    """A ResNet as encoder, skip connections, dice loss."""
    import segmentation_models_pytorch as smp

    def make(generator: Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(3, 32, 32, generator=generator), torch.randint(0, 2, (1, 32, 32), generator=generator)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return smp.losses.DiceLoss("binary")(model(batch[0]), batch[1])

    def model() -> nn.Module:
        return smp.Unet(
            "resnet18",
            encoder_weights=None,
            encoder_depth=3,
            decoder_channels=(16, 16, 16),
            decoder_attention_type="scse",
        )

    return recipe(model, loss, Samples(make))


@case("kornia", "augmentations inside of the model")
def kornia_augmented() -> mh.Recipe:
    """Random flips, rotations and colours, drawn in forward."""
    import kornia.augmentation as augment

    def model() -> nn.Module:
        return nn.Sequential(
            augment.RandomHorizontalFlip(),
            augment.RandomAffine(degrees=20.0, translate=(0.1, 0.1)),
            augment.ColorJitter(0.2, 0.2, 0.2, 0.1, p=0.8),
            augment.RandomErasing(),
            nn.Conv2d(3, 8, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 49, 5),
        )

    def make(generator: Generator) -> tuple[Tensor, Tensor]:
        return torch.rand(3, 16, 16, generator=generator), integer(generator, 5)

    return recipe(model, classification, Samples(make))


@case("lightly", "NT-Xent loss with a memory bank")
def memory_bank() -> mh.Recipe:
    """A queue of negatives, and the position in it, in buffers of the loss."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class Contrast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convolution = nn.Conv2d(3, 8, 3, stride=4)
            self.encoder = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), SimCLRProjectionHead(128, 16, 8))
            self.loss = NTXentLoss(memory_bank_size=(32, 8))

        def forward(self, pictures: Tensor) -> Tensor:
            return self.loss(self.encoder(pictures), self.encoder(pictures + 0.1 * torch.randn_like(pictures)))

    return recipe(Contrast, own_loss, normal(3, 16, 16), buffers={"loss.*": "last"})


@case("lightly", "MoCo")
def moco() -> mh.Recipe:
    """A momentum encoder, which forward updates from the trained parameters."""
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class MoCo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.keys = (nn.Sequential(nn.Flatten(), MoCoProjectionHead(3 * 64, 16, 8)) for _ in range(2))
            deactivate_requires_grad(self.keys)

        def forward(self, pictures: Tensor) -> Tensor:
            update_momentum(self.queries, self.keys, m=0.99)
            keys = self.keys(pictures + 0.1 * torch.randn_like(pictures))
            return F.cross_entropy(self.queries(pictures) @ keys.T, torch.arange(len(pictures)))

    return recipe(MoCo, own_loss, normal(3, 8, 8))


@case("lightly", "DINO loss")
def dino() -> mh.Recipe:
    """The loss keeps a running centre of the teacher's outputs."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    class Dino(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Sequential(nn.Flatten(), DINOProjectionHead(3 * 64, 16, 8, 12))
            self.teacher = nn.Sequential(nn.Flatten(), DINOProjectionHead(3 * 64, 16, 8, 12)).requires_grad_(False)
            self.loss = DINOLoss(output_dim=12)

        def forward(self, pictures: Tensor) -> Tensor:
            views = [pictures + 0.1 * torch.randn_like(pictures) for _ in range(2)]
            return self.loss([self.teacher(view) for view in views], [self.student(view) for view in views], epoch=0)

    return recipe(Dino, own_loss, normal(3, 8, 8))


@case("vit-pytorch", "DINO")
def self_distillation() -> mh.Recipe:
    """The constructor calls the model to create projectors; a teacher by a deep copy; running centres."""
    from vit_pytorch import Dino, ViT

    def model() -> nn.Module:
        encoder = ViT(image_size=16, patch_size=4, num_classes=5, dim=32, depth=2, heads=2, mlp_dim=48)
        return Dino(
            encoder, image_size=16, hidden_layer="to_latent", projection_hidden_size=16, projection_layers=2,
            num_classes_K=12,
        )  # fmt: skip

    return recipe(model, own_loss, Samples(lambda generator: torch.rand(3, 16, 16, generator=generator)))


@case("monai", "U-Net in three dimensions")
def monai_unet() -> mh.Recipe:
    """Instance norm, transposed convolutions in 3D, dice and cross entropy."""
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet

    def make(generator: Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(1, 8, 8, 8, generator=generator), torch.randint(0, 2, (1, 8, 8, 8), generator=generator)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return DiceCELoss(to_onehot_y=True, softmax=True)(model(batch[0]), batch[1])

    return recipe(
        lambda: UNet(3, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, dropout=0.1), loss, Samples(make)
    )
