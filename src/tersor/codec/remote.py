"""Files on a web server, of which only the ranges that are needed are fetched."""

from __future__ import annotations

import re
from http import HTTPStatus

from tersor.codec.errors import about
from tersor.codec.source import Ranges
from tersor.errors import FileError, OptionError

_FIRST = 2**16
"""Bytes of the first request: the header of most files."""
_LONGEST = 86400
"""Seconds to wait: a day."""


class Http(Ranges):
    """A file by its address, read in ranges; the server must know how to send them.

    url: http:// or https://
    timeout: seconds to wait for the server, each time
    """

    def __init__(self, url: str, *, timeout: float = 30) -> None:
        if not isinstance(url, str) or not re.match(r"https?://", url):
            raise OptionError(f"{url!r:.80} is no web address; give one with http:// or https://")
        if not isinstance(timeout, int | float) or not 0 < timeout <= _LONGEST:
            raise OptionError(f"timeout={timeout!r:.40}; give seconds above 0, at most {_LONGEST}")
        self.name = url
        self._timeout = timeout
        self._start = b""
        with about(url):
            self._start, size = self._fetch(0, _FIRST)
        super().__init__(self._range, size)

    def _range(self, offset: int, length: int) -> bytes:
        if offset + length <= len(self._start):
            return self._start[offset : offset + length]
        return self._fetch(offset, length)[0]

    def _fetch(self, offset: int, length: int) -> tuple[bytes, int]:
        """The bytes that are there, and the size of the whole file."""
        # Take longer to import than the rest of this room together.
        from http.client import HTTPException
        from urllib.request import Request, urlopen

        try:
            request = Request(self.name, headers={"Range": f"bytes={offset}-{offset + length - 1}"})
            with urlopen(request, timeout=self._timeout) as answer:
                stated = re.fullmatch(
                    r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", "")
                )
                if answer.status != HTTPStatus.PARTIAL_CONTENT or stated is None:
                    raise FileError(
                        "the server sends no ranges; download the file and load it from there"
                    )
                first, last, size = map(int, stated.groups())
                content: bytes = answer.read(length + 1)
        except (OSError, HTTPException, ValueError) as error:
            # Besides URLError come raw errors of the connection, and of addresses it cannot send.
            # The text may be the server's.
            said = "".join(c if c.isprintable() else " " for c in str(error)[:200]).strip()
            raise FileError(
                f"it cannot be read: {said or type(error).__name__}; check the address and the "
                "connection"
            ) from error
        if first != offset or len(content) != last + 1 - first or len(content) > length:
            raise FileError(
                "the server sent another range than was asked for; download the file and load it "
                "from there"
            )
        return content, size
