"""A digit with holes, for the examples of the documentation: pictures as base64."""

__all__ = ["IMAGE", "MASK"]

IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcAQAAAABaduI5AAAAVElEQVR42m3NsRGCUBRFwfX+MbIAWqAIi7ERZyiF"
    "MgwpgRIeHaAhBBiQcoJND1e1AV2JnuZYZp4rvGCVkxuBSAkT7kQGsdE89uJd4lc4Rs33U1fXP9vLFDtDyhZEAAAA"
    "AElFTkSuQmCC"
)
MASK = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcAQAAAABaduI5AAAAHElEQVR42mNgqP//gYmBgYGBCIKBgcGeFMUkAgDE"
    "3AO+j3zHdAAAAABJRU5ErkJggg=="
)
