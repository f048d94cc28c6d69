"""Input images as the model sees them, and pictures as files. Pillow only: no torch here.

reading.py      decodes image files, or reads their size from the headers; jpeg.py and png.py parse the two formats
colour.py       turns an opened image into upright sRGB
transforms.py   the resize rule
pool.py         decodes in worker processes (worker_process.py), which run worker.py, talk in frames.py and answer in
                pixels_file.py
output.py       encodes pictures for clients
embedding.py    puts the settings of a picture into its file, and reads them
saving.py       writes pictures to files
"""

from __future__ import annotations

from bagel.images.colour import pixel_digest, plain, to_rgb
from bagel.images.embedding import embed, read_settings
from bagel.images.reading import (
    FORMATS,
    StrPath,
    image_size,
    load_image,
)
from bagel.images.saving import free_path, picture_name, save_png, write_error
from bagel.images.transforms import (
    VAE_TRANSFORM,
    VIT_TRANSFORM,
    ImageTransform,
    InputImage,
    PreparedImage,
    ResizedImage,
    UnreadImage,
    prepare,
    resize,
    resized_size,
)

__all__ = [
    "FORMATS",
    "VAE_TRANSFORM",
    "VIT_TRANSFORM",
    "ImageTransform",
    "InputImage",
    "PreparedImage",
    "ResizedImage",
    "StrPath",
    "UnreadImage",
    "embed",
    "free_path",
    "image_size",
    "load_image",
    "picture_name",
    "pixel_digest",
    "plain",
    "prepare",
    "read_settings",
    "resize",
    "resized_size",
    "save_png",
    "to_rgb",
    "write_error",
]
