"""Encoded bytes to an RGB array, with OpenCV's libjpeg-turbo, libpng and libwebp."""

from __future__ import annotations

import cv2
import numpy as np


class DecodeError(ValueError):
    """The bytes are not an image that can be read."""


def decode(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], RGB; grey and transparent images are converted. Raises DecodeError."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    except cv2.error as error:
        raise DecodeError(str(error).strip()) from error
    if image is None:
        raise DecodeError(f"{len(data)} bytes that no decoder recognises")
    return image
