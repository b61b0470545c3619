"""The fields of a tar header: numbers, checksums, names, pax records.

A tar is a chain of 512-byte blocks: a header, the member's contents padded to whole blocks, the
next header, and at the end two blocks of zeros. It has three dialects: ustar (a second name field,
`prefix`), GNU (long names in members of their own, numbers too large for octal in base 256) and
pax (records `length key=value` in members of their own). Nothing here reads a file.

References: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar
manual, "Basic Tar Format".
"""

import unicodedata

import numpy as np

BLOCK = 512
ZEROS = bytes(BLOCK)

# The fields that the reader needs, as columns over an array of header blocks.
HEADER = np.dtype(
    {
        "names": ["name", "checksum", "magic", "prefix"],
        "formats": ["S100", "S8", "S6", "S155"],
        "offsets": [0, 148, 257, 345],
        "itemsize": BLOCK,
    }
)

# Types of members, by the header's byte 156.
REGULAR = frozenset(b"\x0007")  # '\0' of old tars, '0', and '7' (contiguous)
LINKS = frozenset(b"12")
HARD_LINK = ord("1")  # to an earlier member by its full name; else from the link's folder
DEVICES = frozenset(b"346")  # character and block devices, pipes
DIRECTORY = ord("5")
PAX_NEXT = frozenset(b"xX")  # records for the next member ('X': Solaris)
PAX_GLOBAL = ord("g")  # records for all members that follow
GNU_LONG_NAME = ord("L")
GNU_LONG_LINK = ord("K")
GNU_SPARSE = ord("S")
META = PAX_NEXT | {PAX_GLOBAL, GNU_LONG_NAME, GNU_LONG_LINK}

MAX_NUMBER = 2**62  # room to add a few block sizes without leaving 64 bits
_PLACES = np.array([8**5, 8**4, 8**3, 8**2, 8, 1], np.int64)  # of the digits of a checksum


def padded(size: int) -> int:
    """`size` rounded up to whole blocks.

    >>> padded(0), padded(1), padded(512)
    (0, 512, 512)
    """
    return (size + BLOCK - 1) & -BLOCK


def number(field: bytes) -> int:
    r"""A header's number: octal text, or base 256 where the first byte is 0x80.

    >>> number(b"00000001750\0"), number(b"\x80" + (2**33).to_bytes(11, "big")) == 2**33
    (1000, True)

    Raises:
      ValueError: if it is neither, negative, or beyond `MAX_NUMBER`.
    """
    if field[:1] == b"\x80":
        value = int.from_bytes(field[1:], "big")
    else:
        text = field.split(b"\0", 1)[0].strip(b" ")
        if text and not text.isdigit():  # int() also takes signs, underscores and prefixes
            raise ValueError(f"{field!r} is not an octal number")
        value = int(text, 8) if text else 0
    if value > MAX_NUMBER:
        raise ValueError(f"{value} is beyond what a file can hold")
    return value


def decimal(value: bytes) -> int:
    """A pax record's number, which unlike a header's is decimal.

    >>> decimal(b"600")
    600

    Raises:
      ValueError: if it is none, or beyond `MAX_NUMBER`.
    """
    if not value.isdigit() or len(value) > 19 or int(value) > MAX_NUMBER:
        raise ValueError(f"{value[:30]!r} is not a size")
    return int(value)


def checksums_ok(blocks: np.ndarray) -> np.ndarray:
    """Which of `blocks`, uint8 [n, 512], carry the checksum that belongs to them; bool [n].

    The sum of all bytes, the checksum field itself counted as eight spaces. Some old writers
    summed signed bytes; readers accept both.
    """
    fields = blocks[:, 148:156].copy()
    sums = _sums(blocks) - _sums(fields) + 8 * ord(" ")
    digits = fields[:, :6] - np.uint8(ord("0"))  # what is no digit becomes a large number
    plain = (digits < 8).all(axis=1) & ((fields[:, 6] == 0) | (fields[:, 6] == ord(" ")))
    ok = plain & (digits @ _PLACES == sums)
    for i in np.flatnonzero(~ok).tolist():
        try:
            stated = number(fields[i].tobytes())
        except ValueError:
            continue
        high = int((blocks[i] > 127).sum()) - int((fields[i] > 127).sum())
        # A block of zeros says 0, which no header's bytes add up to.
        ok[i] = stated in (sums[i], sums[i] - 256 * high)
    return ok


def _sums(blocks: np.ndarray) -> np.ndarray:
    """The sum of each block's bytes, int64 [n]: eight bytes at once, in lanes of 16 bits."""
    words, low = blocks.view(np.uint64), np.uint64(0x00FF00FF00FF00FF)
    some = words >> np.uint64(8)
    some &= low
    lanes = some.sum(axis=1)
    lanes += np.bitwise_and(words, low, out=some).sum(axis=1)
    return lanes.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)


def is_header(block: bytes) -> bool:
    """Whether one block is a header with the right checksum."""
    if len(block) != BLOCK or block[148:156] == bytes(8):
        return False
    return bool(checksums_ok(np.frombuffer(block, np.uint8).reshape(1, BLOCK))[0])


def names(blocks: np.ndarray, rows: np.ndarray | slice = slice(None)) -> list[bytes]:
    """The names in these rows of `blocks`, uint8 [n, 512], with ustar's prefix if there is one."""
    fields = blocks.view(HEADER)[:, 0]
    found: list[bytes] = fields["name"][rows].tolist()  # NumPy drops the trailing zeros
    if b"\0" in b"".join(found):  # the rest is left over from another member
        found = [name.split(b"\0", 1)[0] for name in found]
    # GNU's old magic is "ustar ", and its prefix field holds other things.
    prefixed = (fields["magic"][rows] == b"ustar") & (blocks[rows, 345] != 0)
    for i in np.flatnonzero(prefixed).tolist():
        found[i] = fields["prefix"][rows][i].split(b"\0", 1)[0] + b"/" + found[i]
    return found


def plain(path: bytes) -> bytes:
    r"""A member's name in the one form that all writers' names are compared in.

    Without leading and double "/" and ".", with ".."; its letters are composed (Unicode NFC).

    >>> plain(b"./train//7/"), plain("cafe\u0301/1.png".encode()) == "caf\xe9/1.png".encode()
    (b'train/7', True)
    """
    if not path.isascii():
        text = path.decode("utf-8", "surrogateescape")
        path = unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")
    return b"/".join([part for part in path.split(b"/") if part not in (b"", b".")])


def path_alone(data: bytes) -> bytes | None:
    r"""The path that a pax header begins with; None without one, or if more of it may matter.

    >>> path_alone(b"9 path=a\n13 mtime=1.5\n"), path_alone(b"9 path=a\n9 size=1\n")
    (b'a', None)
    """
    record, _, rest = data.partition(b"\n")
    digits, _, path = record.partition(b" path=")
    more = 112 in rest or 122 in rest  # p or z, of which each key that matters has one
    return None if more or digits != b"%d" % (len(record) + 1) else path or None


def pax_records(data: bytes) -> dict[bytes, bytes]:
    r"""The records of a pax header that tell a member's name, size or link.

    Each is `length key=value\n`, the length counting itself. Those after the last that matters are
    not looked at.

    >>> pax_records(b"13 gname=uni\n16 path=a/b.png\n12 size=345\n13 mtime=1.5\n")
    {b'path': b'a/b.png', b'size': b'345'}

    Raises:
      ValueError: if a record does not have that form.
    """
    records = {}
    at, last = 0, max(map(data.rfind, (b"path=", b"size=", b"GNU.sparse.")))
    while at <= last:
        space = data.find(b" ", at, at + 20)
        digits = data[at:space] if space > at else b""
        if not digits.isdigit():
            raise ValueError(f"no length at byte {at} of a pax header")
        end = at + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(data) or data[end - 1] != ord("\n") or not equals:
            raise ValueError(f"a record of wrong length at byte {at} of a pax header")
        if key in (b"path", b"size", b"linkpath") or key.startswith(b"GNU.sparse."):
            records[key] = value
        at = end
    return records
