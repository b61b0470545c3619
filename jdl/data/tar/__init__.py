"""Tar archives: finding their members, indexing them, reading them at random or in order.

    paths → open (archive, seekable, remote, inflate) → scan (format) → index → source; stream

`source.TarSource` reads records at random by an index, `stream.MemberStream` members in order
without one.
"""
