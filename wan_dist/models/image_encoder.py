"""Pictures as a model sees them: the image encoder of Wan2.1 image-to-video (transformers' own CLIP, diffusers' own use
of it), and pixels for the VAE."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

# Names of the published weights; transformers drops the prefix when it loads them.
WEIGHTS_PREFIX = "vision_model."


def meta_image_encoder(folder: Path, class_name: str) -> Any:
    """The encoder of a checkpoint's `image_encoder` folder, without memory for its weights. Its table of position
    numbers, which no checkpoint holds, is made for real."""
    import transformers

    config = transformers.CLIPVisionConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    for module in model.modules():
        positions = module._buffers.get("position_ids")
        if positions is not None:
            module.position_ids = torch.arange(positions.shape[-1]).expand(positions.shape)
    return model.eval().requires_grad_(False)


def load_image_processor(folder: Path, class_name: str) -> Any:
    """What makes the encoder's input of a picture, of a checkpoint's `image_processor` folder."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # without torchvision it says so; diffusers would then use the same
    try:
        return getattr(transformers, class_name).from_pretrained(folder)
    finally:
        transformers.logging.set_verbosity(level)


def encode_images(encoder: Any, processor: Any, images: list[Image.Image], device: torch.device) -> torch.Tensor:
    """`[len(images), tokens, width]` in the encoder's dtype: its last but one layer, by
    `WanImageToVideoPipeline.encode_image`."""
    from diffusers import WanImageToVideoPipeline

    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, image_encoder=encoder, image_processor=processor
    )
    return pipe.encode_image(images, device)


def pixels(images: list[Image.Image], height: int, width: int, stride: int) -> torch.Tensor:
    """`[len(images), 3, height, width]`, fp32 in [-1, 1], resized by diffusers' video processor; both sides are
    multiples of the VAE's stride in space."""
    from diffusers.video_processor import VideoProcessor

    processor = VideoProcessor(vae_scale_factor=stride)
    return torch.cat([processor.preprocess(image, height=height, width=width) for image in images]).float()
