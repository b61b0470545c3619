"""A tar's members in order, in constant memory, without an index."""

from collections.abc import Iterator
from typing import NamedTuple

from jdl.data.tar import format as fmt
from jdl.data.tar import scan
from jdl.data.tar.archive import Archive
from jdl.data.tar.walk import Walk

MAX_MEMBER = 1 << 28  # bytes; larger members are skipped


class Member(NamedTuple):
    """One regular file."""

    name: str  # in the archive, as text
    image: bool  # whether it has an image's extension
    data: bytes  # its bytes


class MemberStream:
    """The regular files of an archive, in its order; damage is noted and skipped.

    Links cannot be followed, nor can it be known that a later member of the same name replaces one:
    each link that is named as an image is noted, and members of equal names all come.
    """

    def __init__(self, archive: Archive):
        self._archive, self._walk = archive, Walk(archive)
        self._walk.many = 1  # yields each member before reading what follows it
        self.damage = self._walk.damage  # found so far

    def __iter__(self) -> Iterator[Member]:
        walk = self._walk
        for _ in walk.steps():
            for (offsets, sizes, kinds, ids, *_), base in zip(walk.parts, walk.bases, strict=True):
                if not len(offsets):
                    continue
                folder = fmt.plain([*walk.folders][ids[0]])
                name = scan.text(folder + b"/" + base if folder else base)
                size, kind = int(sizes[0]), kinds[0]
                for _, target in walk.links.values() if scan.image_name(base) else ():
                    detail = f"a link to {scan.text(target[:200])!r}, which a stream cannot follow"
                    walk.note("link", int(offsets[0]) - fmt.BLOCK, name.encode(), detail)
                if kind not in (scan.IMAGE, scan.OTHER):
                    continue
                if size > MAX_MEMBER:
                    detail = f"it has {size} bytes, more than the {MAX_MEMBER} that are read"
                    walk.note("damaged", int(offsets[0]), name.encode(), detail)
                    continue
                data = self._archive.pread(size, int(offsets[0]))
                if len(data) < size:
                    walk.size = self._archive.size
                    walk.note_cut(int(offsets[0]) - 512, name.encode(), int(offsets[0]), size)
                    continue
                yield Member(name, bool(kind == scan.IMAGE), data)
            walk.parts.clear()
            walk.bases.clear()
            walk.folders.clear()
            walk.links.clear()
        walk.note_unlisted()
