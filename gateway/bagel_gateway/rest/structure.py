"""The structure of a JSON body, bounded as it comes: once parsed, it may be thirty times as large."""

from __future__ import annotations

import re

from bagel.errors import InvalidRequest

_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))


class Structure:
    """Counts what is outside strings: values and depth; and escapes in strings, which are slow to read.

    It judges no syntax: whatever is no JSON is found so by the parser, which has as little to do then.
    """

    def __init__(self, max_values: int, max_depth: int, max_escapes: int) -> None:
        self._max_values, self._max_depth, self._max_escapes = max_values, max_depth, max_escapes
        self._values = self._strings = self._depth = self._escapes = 0
        self._in_string = self._escaped = False

    def feed(self, piece: bytes) -> None:
        """Take the next bytes; raises InvalidRequest once there is more than is read."""
        at = 0
        while at < len(piece):
            at = self._string(piece, at) if self._in_string else self._outside(piece, at)

    def _outside(self, piece: bytes, at: int) -> int:
        """Up to the next string, or the end."""
        quote = piece.find(b'"', at)
        end = quote if quote >= 0 else len(piece)
        between = piece[at:end]
        # Each value but the first follows one of these, and has one string before it at most, and one in it.
        self._values += sum(map(between.count, (b",", b"[", b"{")))
        self._strings += quote >= 0
        if max(self._values, self._strings / 2) > self._max_values:
            problem = f"the body has more than {self._max_values} JSON values, by its commas, brackets and strings"
            raise InvalidRequest("body", f"{problem}: the most that is read")
        for bracket in between.translate(None, _NO_BRACKET):
            self._depth += 1 if bracket in b"[{" else -1
            if self._depth > self._max_depth:
                problem = f"the body has more than {self._max_depth} objects and lists within each other"
                raise InvalidRequest("body", f"{problem}, the most that is read")
        self._in_string = quote >= 0
        return end + 1

    def _string(self, piece: bytes, at: int) -> int:
        """Up to behind the string's end, or the end of the piece."""
        begin = at
        if self._escaped:  # the last byte of the piece before was a backslash
            self._escaped = False
            at += 1
        at = self._end_of_string(piece, at)
        self._escapes += piece.count(b"\\", begin, at + 1)
        if self._escapes > self._max_escapes:
            problem = f"the body has more than {self._max_escapes} escapes in its strings, the most that is read"
            raise InvalidRequest("body", f"{problem}; send text as UTF-8")
        if at < len(piece):
            self._escaped = piece[at] == ord("\\")
            self._in_string = self._escaped
        return at + 1

    @staticmethod
    def _end_of_string(piece: bytes, at: int) -> int:
        """The place of its closing quote, or of a backslash that ends the piece, or the end of the piece."""
        quote = piece.find(b'"', at)
        end = quote if quote >= 0 else len(piece)
        if piece.find(b"\\", at, end) < 0:  # most are long and have none: files in base64
            return end
        match = _REST_OF_STRING.match(piece, at)
        return match.end() if match else at
