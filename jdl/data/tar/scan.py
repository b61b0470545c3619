"""What a scan of an archive finds: its members, of which kinds they are, and its damage."""

from typing import NamedTuple

import numpy as np

# Kinds of members, as stored in an index. OLDER is an image that a later member replaces.
IMAGE, OTHER, FOLDER, LINK, DEVICE, SPARSE, CUT, OLDER = range(8)

IMAGE_EXTENSIONS = frozenset(
    b"jpg jpeg jpe jfif png webp bmp gif pgm ppm pbm pnm tif tiff jp2 j2k avif".split()
)


class Damage(NamedTuple):
    """One defect of an archive."""

    word: str  # "checksum", "truncated", "damaged", "sparse", "concatenated", "link" or "duplicate"
    offset: int  # its place in the archive, in bytes
    name: str  # the member concerned, if it is known
    detail: str  # a sentence
    lost: bool  # whether something cannot be read because of it


class Columns(NamedTuple):
    """An archive's n members as arrays; names are `folder/base` (see `format.plain`)."""

    offsets: np.ndarray  # int64 [n], where each member's contents begin
    sizes: np.ndarray  # int64 [n]
    kinds: np.ndarray  # uint8 [n], IMAGE, OTHER, …
    folder_ids: np.ndarray  # int32 [n], into the folders
    base_ends: np.ndarray  # int64 [n], where each base name ends in `bases`
    bases: np.ndarray  # uint8, all base names, concatenated
    folder_ends: np.ndarray  # int64 [folders], where each folder's name ends in `folders`
    folders: np.ndarray  # uint8, all folders' names, concatenated

    def folder_names(self) -> list[bytes]:
        """The folders' names, in the order of `folder_ids`."""
        whole, ends = self.folders.tobytes(), self.folder_ends.tolist()
        return [whole[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def base(self, i: int) -> bytes:
        """The last part of member `i`'s name."""
        return self.bases[self.base_ends[i - 1] if i else 0 : self.base_ends[i]].tobytes()

    def name(self, i: int) -> bytes:
        """The full name of member `i`."""
        n = self.folder_ids[i]
        folder = self.folders[self.folder_ends[n - 1] if n else 0 : self.folder_ends[n]].tobytes()
        return folder + b"/" + self.base(i) if folder else self.base(i)


def text(name: bytes) -> str:
    """A member's name as text: bytes that are not UTF-8 become escapes."""
    return name.decode("utf-8", "backslashreplace")


def image_name(base: bytes) -> bool:
    """Whether a file with this base name is an image, going by its extension."""
    # macOS stores a file's attributes as a second one, `._` and the name.
    return base.rpartition(b".")[2].lower() in IMAGE_EXTENSIONS and base[:2] != b"._"
