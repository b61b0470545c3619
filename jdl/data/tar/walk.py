"""Walks a tar from header to header, without reading the members' contents.

The walk trusts each header to find the next one, keeps the blocks, and verifies thousands of
checksums at once; at the first bad one it goes back there. Damage never ends the walk: what is lost
is noted, and the walk continues at the next valid header.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jdl.data.tar import format as fmt
from jdl.data.tar import scan
from jdl.data.tar.archive import Archive
from jdl.data.tar.format import BLOCK

# The kind of a member by its type; regular files are images only if named so.
_KINDS = np.full(256, scan.OTHER, np.uint8)
_KINDS[[*fmt.REGULAR]] = scan.IMAGE
_KINDS[[*fmt.LINKS]] = scan.LINK
_KINDS[[*fmt.DEVICES]] = scan.DEVICE
_KINDS[fmt.DIRECTORY] = scan.FOLDER
_KINDS[fmt.GNU_SPARSE] = scan.SPARSE
_DTYPES = (np.int64, np.int64, np.uint8, np.int32, np.int64, np.int32)

_USUAL_ENDINGS = (b".jpg", b".png", b".jpeg", b".JPEG")
_MANY = 1024  # headers verified at once, in memory that the allocator keeps for the next
_CHUNK = 1 << 20  # bytes that a search for a header reads at once
_BEGINNING = 1 << 20  # a file without a header in its first bytes, so many, is not a tar
_MAX_META = 1 << 24  # bytes of a pax header or a long name
_MAX_NAME = 1 << 15
_MAX_DAMAGE = 1000  # entries kept; more are counted


class Last(NamedTuple):
    """The last member, if it is named as an image: its header's place, its contents' range."""

    place: int
    start: int
    end: int
    name: bytes


class Walk:
    """The state of one scan."""

    def __init__(self, archive: Archive):
        self.archive, self.size = archive, archive.size
        # What can be read only once is verified header by header.
        self.many = _MANY if archive.rewinds else 1
        self.damage: list[scan.Damage] = []
        self.unlisted: Counter[tuple[str, bool]] = Counter()
        # Headers not yet verified, their places, and the sizes of their members.
        self.blocks: list[bytes] = []
        self.places: list[int] = []
        self.sizes: list[int] = []
        self.metas: list[int] = []  # which of them describe other members
        # For members that other headers name, or of an unusual sort: where the contents begin, the
        # type, the name if another header gave it, and a link's target.
        self.special: dict[int, tuple[int, int, bytes | None, bytes]] = {}
        # Verified members, thousands in each entry, in the order of `Columns`, with hashes of the
        # base names.
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.bases: list[bytes] = []
        self.members = 0
        # Links, by number of the member: whether it is a hard one, and its target.
        self.links: dict[int, tuple[bool, bytes]] = {}
        self.folders: dict[bytes, int] = {}  # by name, as written
        # What pax and GNU headers say about the next member, and about all later ones (from where).
        self.next_name: bytes | None = None
        self.next_link: bytes | None = None
        self.next_pax: dict[bytes, bytes] = {}
        self.globals: list[tuple[int, dict[bytes, bytes]]] = [(-1, {})]
        self.problem = ""  # what is wrong with the header that `chain` stopped at
        self.last: Last | None = None
        self.window, self.base, self.headers_before = b"", 0, 0
        self.verified = 0

    def steps(self) -> Iterator[None]:
        """Walks to the end, whatever the archive holds; yields after adding members."""
        at: int | None = 0 if self.plausible() else None
        while at is not None:
            at = self.chain(at)
            bad = self.verify()
            yield
            if bad is not None:
                at = self.recover(bad, "")
            elif self.problem:
                at = self.recover(at, self.problem)
            elif at + BLOCK > self.size:
                resume = self.inside_last(self.size)
                if resume is None and not self.archive.problem:
                    self.note("truncated", at, b"", "the archive ends without its end marker")
                at = resume
            elif self.block(at) == fmt.ZEROS:
                at = self.zeros(at)
            self.problem = ""
        if self.archive.problem:
            word = "truncated" if "cut short" in self.archive.problem else "damaged"
            self.note(word, self.size, b"", self.archive.problem)

    def plausible(self) -> bool:
        """Whether a tar begins at the start or soon after; notes it if not."""
        head = self.read(BLOCK, 0)
        if not head:
            if not self.archive.problem:
                self.note("truncated", 0, b"", "it is empty (0 bytes), no tar archive")
            return False
        if head == fmt.ZEROS or fmt.is_header(head) or head[257:262] == b"ustar":
            return True
        if self.find_header(0, limit=_BEGINNING) is not None:
            return True
        self.note("damaged", 0, b"", f"it is no tar archive: it begins with {head[:16]!r}")
        return False

    def read(self, size: int, at: int) -> bytes:
        """Bytes of the archive; updates the size, which a stream knows only at its end."""
        data = self.archive.pread(size, at)
        self.size = self.archive.size
        return data

    def chain(self, at: int) -> int:
        """Follows headers from `at`; returns the place where it stopped.

        That is the file's end, a block of zeros, a header that cannot be read (see `problem`), or
        where enough headers wait to be verified.
        """
        blocks, places, sizes, metas = self.blocks, self.places, self.sizes, self.metas
        window, base, alone, name = self.window, self.base, self.alone(), self.next_name
        window = window if at >= base else b""
        for number in range(len(blocks), self.many):
            start = at - base
            block = window[start : start + BLOCK]
            if len(block) < BLOCK:
                if at + BLOCK > self.size:
                    break
                block = self.block(at)
                window, base, start = self.window, self.base, at - self.base
            digits = block[124:135]
            usual = alone and digits.isdigit() and block[135] in b"\0 "
            if usual:
                kind = block[156]
                try:
                    size = int(digits, 8)
                except ValueError:
                    self.problem = f"its size {digits!r} is not an octal number"
                    break
                if kind == 48 or kind == 0:  # the most common header, with a size in octal
                    if name is not None:
                        self.special[number] = at + BLOCK, kind, name, b""
                        name = self.next_name = None
                elif kind == 120 and name is None:
                    data = window[start + BLOCK : start + BLOCK + size]
                    usual = len(data) == size <= _MAX_NAME
                    if 112 in data or 122 in data:  # p or z: path, linkpath, GNU.sparse, size
                        name = self.next_name = fmt.path_alone(data) if usual else None
                        usual = name is not None
                    if usual:
                        metas.append(number)
                else:
                    usual = False
            if usual:
                blocks.append(block)
                places.append(at)
                sizes.append(size)
                at += BLOCK + ((size + BLOCK - 1) & -BLOCK)
                continue
            if block == fmt.ZEROS:
                break
            try:
                at = self.unusual(at, block)
            except ValueError as error:
                self.problem = str(error)
                break
            window, base, alone, name = self.window, self.base, self.alone(), self.next_name
        return at

    def alone(self) -> bool:
        """Whether earlier headers say no more about the next member than a name of usual length."""
        about_next = self.next_pax or self.globals[-1][1] or self.next_link
        return not about_next and len(self.next_name or b"") <= _MAX_NAME

    def forget(self) -> None:
        """Drops what earlier headers say about the next member."""
        self.next_name, self.next_link, self.next_pax = None, None, {}

    def block(self, at: int) -> bytes:
        """The block at `at`; beyond the file's end there are zeros."""
        start = at - self.base
        if start < 0 or start + BLOCK > len(self.window):
            # Where headers are close together, one wide read gets many of them.
            headers = self.verified + len(self.blocks)
            archive = self.archive
            close = at - self.base <= archive.stride * (headers - self.headers_before)
            self.window = self.read(archive.wide if close else archive.narrow, at)
            self.base, self.headers_before, start = at, headers, 0
        return self.window[start : start + BLOCK].ljust(BLOCK, b"\0")

    def unusual(self, at: int, block: bytes) -> int:
        """Reads a header of any sort but the most common; returns the place of the next one."""
        kind = block[156]
        data = at + BLOCK
        number = len(self.blocks)
        self.metas.append(number)
        self.blocks.append(block)
        self.places.append(at)
        self.sizes.append(0)
        size = fmt.number(block[124:136])
        if kind in fmt.META:
            self.meta(kind, at, size)
            return data + fmt.padded(size)
        pax = self.globals[-1][1] | self.next_pax
        name = pax.get(b"path") or self.next_name
        link = pax.get(b"linkpath") or self.next_link
        self.forget()
        for what, given in (("name", name), ("link's target", link)):
            if given is not None and len(given) > _MAX_NAME:
                raise ValueError(f"its {what} has {len(given)} bytes, more than {_MAX_NAME}")
        if b"size" in pax:
            size = fmt.decimal(pax[b"size"])
        if kind in fmt.LINKS or kind in fmt.DEVICES or kind == fmt.DIRECTORY:
            size = 0  # whatever the field says, no contents follow
        if kind == fmt.GNU_SPARSE:
            # More of the map of holes may follow the header; each block has a flag for that.
            more = block[482]
            while more and data + BLOCK <= self.size:
                more = self.block(data)[504]
                data += BLOCK
        elif any(key.startswith(b"GNU.sparse.") for key in pax):
            kind = fmt.GNU_SPARSE
        if link is None:
            link = block[157:257].split(b"\0", 1)[0]
        self.sizes[number] = size
        self.metas.pop()
        self.special[number] = (data, kind, name, link)
        return data + fmt.padded(size)

    def meta(self, kind: int, at: int, size: int) -> None:
        """Reads a header that describes other members."""
        if size > _MAX_META:
            raise ValueError(f"its extended header has {size} bytes, more than {_MAX_META}")
        start = at + BLOCK - self.base
        data = self.window[start : start + size] if start >= 0 else b""
        if len(data) < size:
            data = self.read(size, at + BLOCK)
        if kind == fmt.GNU_LONG_NAME:
            self.next_name = data.split(b"\0", 1)[0]
        elif kind == fmt.GNU_LONG_LINK:
            self.next_link = data.split(b"\0", 1)[0]
        elif kind == fmt.PAX_GLOBAL:
            self.globals.append((at, self.globals[-1][1] | fmt.pax_records(data)))
            del self.globals[1:-2]  # going back over a bad header needs no more
        elif kind in fmt.PAX_NEXT:
            self.next_pax = fmt.pax_records(data)

    def verify(self) -> int | None:
        """Adds the waiting headers up to the first bad one; returns that one's place."""
        if not self.blocks:
            return None
        blocks = np.frombuffer(b"".join(self.blocks), np.uint8).reshape(-1, BLOCK)
        ok = fmt.checksums_ok(blocks)
        bad = None if ok.all() else int(np.argmin(ok))
        place = None if bad is None else self.places[bad]
        if place is not None:
            self.forget()
            while self.globals[-1][0] >= place:
                self.globals.pop()
        self.take(blocks, len(blocks) if bad is None else bad)
        self.verified += len(self.blocks)
        for waiting in (self.blocks, self.places, self.sizes, self.metas, self.special):
            waiting.clear()
        return place

    def take(self, blocks: np.ndarray, count: int) -> None:
        """Adds the members of the first `count` waiting headers, which are valid."""
        kept = np.ones(len(blocks), bool)
        kept[self.metas] = False
        kept[count:] = False
        rows = np.flatnonzero(kept)
        types, names = blocks[rows, 156], fmt.names(blocks, rows)
        places = np.array(self.places, np.int64)[rows]
        sizes = np.array(self.sizes, np.int64)[rows]
        offsets = places + BLOCK
        if self.special:
            numbers = (np.cumsum(kept) - 1).tolist()
            for i, (offset, kind, name, link) in self.special.items():
                if i < count:
                    n = numbers[i]
                    offsets[n], types[n] = offset, kind
                    names[n] = names[n] if name is None else name
                    if kind in fmt.LINKS:
                        self.links[self.members + n] = kind == fmt.HARD_LINK, link
        kinds = _KINDS[types]
        for i in np.flatnonzero((types == 0) | (kinds == scan.FOLDER)).tolist():
            if names[i].endswith(b"/"):  # old tars mark folders so
                names[i] = fmt.plain(names[i])
                kinds[i] = scan.FOLDER
        cut = offsets + sizes > self.size
        for i in np.flatnonzero(cut).tolist():
            self.note_cut(int(places[i]), names[i], int(offsets[i]), int(sizes[i]))
        kinds[cut] = scan.CUT
        for i in np.flatnonzero(kinds == scan.SPARSE).tolist():
            self.note("sparse", int(places[i]), names[i], "files with holes are not read")
        if names:
            self.add(names, offsets, sizes, kinds)
            end = int(offsets[-1] + sizes[-1])
            image = scan.image_name(names[-1].rpartition(b"/")[2])
            last = Last(int(places[-1]), int(offsets[-1]), end, names[-1])
            self.last = last if image else None

    def add(
        self, names: list[bytes], offsets: np.ndarray, sizes: np.ndarray, kinds: np.ndarray
    ) -> None:
        """Adds members with these names, as written."""
        split = [name.rpartition(b"/") for name in names]
        bases = [base for _, _, base in split]
        whole = b"".join(bases)
        if not whole.isascii() or b"" in bases or b"." in bases:
            split = [fmt.plain(name).rpartition(b"/") for name in names]
            bases = [base for _, _, base in split]
            whole = b"".join(bases)
        images = np.array([b.endswith(_USUAL_ENDINGS) or scan.image_name(b) for b in bases], bool)
        if b"._" in whole:
            images &= [base[:2] != b"._" for base in bases]
        kinds[(kinds == scan.IMAGE) & ~images] = scan.OTHER
        ids, new = self.folders, self.folders.setdefault
        folder_ids = np.array([new(folder, len(ids)) for folder, _, _ in split], np.int32)
        lengths = np.fromiter(map(len, bases), np.int64, len(bases))
        hashes = np.fromiter(map(hash, bases), np.int64, len(bases)).astype(np.int32)
        self.parts.append((offsets, sizes, kinds, folder_ids, lengths, hashes))
        self.bases.append(whole)
        self.members += len(names)

    # ------------------------------------------------------------------ damage

    def note_cut(self, place: int, name: bytes, offset: int, size: int) -> None:
        """Notes a member that is incomplete."""
        have = max(self.size - offset, 0)
        detail = f"it has {size} bytes, of which {have} are in the archive"
        self.note("truncated", place, name, detail)

    def note(self, word: str, at: int, name: bytes, detail: str, lost: bool = True) -> None:
        """Notes one defect."""
        if len(self.damage) < _MAX_DAMAGE:
            name_text = scan.text(fmt.plain(name)[:200])
            self.damage.append(scan.Damage(word, at, name_text, detail, lost))
        else:
            self.unlisted[word, lost] += 1

    def note_unlisted(self) -> None:
        """Notes how many defects have no entry of their own."""
        for (word, lost), count in self.unlisted.items():
            self.damage.append(scan.Damage(word, 0, "", f"and {count} more", lost))
        self.unlisted.clear()

    def recover(self, at: int, problem: str) -> int | None:
        """Notes the bad header at `at`; returns the place of the next valid one, if any."""
        if (inside := self.inside_last(at)) is not None:
            return inside
        block = self.block(at)
        self.forget()
        looks = block[257:262] == b"ustar"
        name = fmt.names(np.frombuffer(block, np.uint8).reshape(1, BLOCK))[0] if looks else b""
        resume = self.beyond(at, block) if looks else None
        if resume is None:
            resume = self.find_header(at + BLOCK)
        word = "damaged" if problem else "checksum"
        detail = problem or "its header does not match its checksum"
        if resume is None:
            detail += f"; nothing readable follows in the last {self.size - at} bytes"
        else:
            detail += f"; {resume - at} bytes passed over"
        self.note(word, at, name, detail)
        return resume

    def inside_last(self, before: int) -> int | None:
        """The place of a header inside the last member, whose stated size is then wrong.

        Only images are checked: other files may contain archives.
        """
        last, self.last = self.last, None
        if last is None or self.archive.mode == "stream":
            return None
        end = min(last.end, before)
        found = self.find_header(last.start, limit=end - last.start + BLOCK)
        if found is None or found >= end:
            return None
        if self.parts[-1][2][-1] != scan.CUT:
            self.parts[-1][2][-1] = scan.CUT
            detail = f"its size of {last.end - last.start} bytes runs over members after it"
            self.note("damaged", last.place, last.name, detail)
        return found

    def beyond(self, at: int, block: bytes) -> int | None:
        """Where a bad header's member ends, if another header or an end marker is exactly there."""
        try:
            after = at + BLOCK + fmt.padded(fmt.number(block[124:136]))
        except ValueError:
            return None
        if after + BLOCK > self.size or self.archive.mode == "stream":
            return None
        next_block = self.block(after)
        return after if next_block == fmt.ZEROS or fmt.is_header(next_block) else None

    def find_header(self, at: int, limit: int | None = None) -> int | None:
        """The place of the first valid ustar, GNU or pax header from `at` on, at any alignment."""
        end = self.size if limit is None else min(self.size, at + limit)
        while at + BLOCK <= end:
            chunk = self.read(_CHUNK + BLOCK, at)
            if len(chunk) < BLOCK:
                return None
            found = chunk.find(b"ustar", 257)
            while found >= 0:
                start = found - 257
                if start >= _CHUNK:
                    break
                block = chunk[start : start + BLOCK]
                if block[148:154].strip(b" ").isdigit() and fmt.is_header(block):
                    return at + start
                found = chunk.find(b"ustar", found + 1)
            at += _CHUNK
        return None

    def zeros(self, at: int) -> int | None:
        """Looks past the end marker at `at`; returns the place of a further archive, if any."""
        place = at
        while place < self.size:
            chunk = self.read(_CHUNK, place)
            if not chunk:
                return None
            rest = len(chunk.lstrip(b"\0"))
            place += len(chunk) - rest
            if rest:
                break
        else:
            return None
        place -= (place - at) % BLOCK
        if place + BLOCK <= self.size and fmt.is_header(self.block(place)):
            detail = "a further archive follows the end marker; it is read too"
            self.note("concatenated", place, b"", detail, lost=False)
            return place
        resume = self.find_header(place)
        passed = (self.size if resume is None else resume) - place
        self.note("damaged", place, b"", f"{passed} bytes after an end marker are not members")
        return resume

    def columns(self) -> tuple[scan.Columns, np.ndarray]:
        """The members found, as arrays, and hashes of their base names, int32 [n]."""
        parts = zip(*self.parts, strict=True) if self.parts else [()] * len(_DTYPES)
        offsets, sizes, kinds, folder_ids, lengths, hashes = (
            np.concatenate([np.empty(0, dtype), *column])
            for dtype, column in zip(_DTYPES, parts, strict=True)
        )
        self.parts.clear()
        ids: dict[bytes, int] = {}  # by the folders' plain names
        plain = [ids.setdefault(fmt.plain(folder), len(ids)) for folder in self.folders]
        columns = scan.Columns(
            offsets,
            sizes,
            kinds,
            np.array(plain, np.int32)[folder_ids],
            np.cumsum(lengths),
            np.frombuffer(b"".join(self.bases), np.uint8),
            np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids))),
            np.frombuffer(b"".join(ids), np.uint8),
        )
        # A stream's size is known only at the end: the last member may exceed it.
        for i in np.flatnonzero((offsets + sizes > self.size) & (kinds != scan.CUT)).tolist():
            place, size = int(offsets[i]), int(sizes[i])
            self.note_cut(place - BLOCK, columns.name(i), place, size)
            kinds[i] = scan.CUT
        return columns, hashes
