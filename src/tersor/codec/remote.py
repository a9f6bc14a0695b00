"""Files on a web server, of which only the ranges that are needed are fetched."""

from __future__ import annotations

import re
from http import HTTPStatus

from tersor.codec.source import Ranges
from tersor.errors import FileError, OptionError

_FIRST = 2**16
"""Bytes of the first request: the header of most files."""


class Http(Ranges):
    """A file by its address, read in ranges; the server must know how to send them.

    url: http:// or https://
    timeout: seconds to wait for the server, each time
    """

    def __init__(self, url: str, *, timeout: float = 30) -> None:
        if not re.match(r"https?://", url):
            raise OptionError(f"{url!r:.80} is no web address; give one with http:// or https://")
        self.name = url
        self._timeout = timeout
        self._start = b""
        self._start, size = self._fetch(0, _FIRST)
        super().__init__(self._range, size)

    def _range(self, offset: int, length: int) -> bytes:
        if offset + length <= len(self._start):
            return self._start[offset : offset + length]
        return self._fetch(offset, length)[0]

    def _fetch(self, offset: int, length: int) -> tuple[bytes, int]:
        """The bytes that are there, and the size of the whole file."""
        # Takes longer to import than the rest of this room together.
        from urllib.error import URLError
        from urllib.request import Request, urlopen

        request = Request(self.name, headers={"Range": f"bytes={offset}-{offset + length - 1}"})
        try:
            with urlopen(request, timeout=self._timeout) as answer:
                stated = re.fullmatch(
                    r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", "")
                )
                if answer.status != HTTPStatus.PARTIAL_CONTENT or stated is None:
                    raise FileError(
                        f"{self.name}: the server sends no ranges; download the file and load it "
                        "from there"
                    )
                first, last, size = map(int, stated.groups())
                content: bytes = answer.read(length + 1)
        except URLError as error:
            raise FileError(f"{self.name} cannot be read: {error}; check the address") from error
        if first != offset or len(content) != last + 1 - first or len(content) > length:
            raise FileError(f"{self.name}: the server sent another range than was asked for")
        return content, size
