"""Tokens -> text, piece by piece: whole code points only, and nothing that may still turn out to be a stop string.

Pure: knows a tokenizer and nothing of models, sockets or requests. For what is valid UTF-8 the joined pieces are the
decode of all tokens, cut before the first stop string; special tokens are never shown. Bytes that are no UTF-8 come
out as U+FFFD: byte-level tokenizers put it where the whole decode does, byte-fallback ones may place it a little
later, because their decoder takes back characters that were right when they were sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one answer."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decode = tokenizer.decode
        self._filter = StopFilter(stop)
        # The tokens since the last but one clean point (where no code point was open). Those before the last one are
        # context: a decoder treats the first token of a text differently (it strips a leading space).
        self._window: list[int] = []
        self._num_context = 0
        self._num_sent = 0  # characters of the window's text already passed on

    @property
    def stopped(self) -> bool:
        """Whether a stop string came; no text follows then."""
        return self._filter.stopped

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; may be empty."""
        self._window.append(token_id)
        text = self._decode(self._window, skip_special_tokens=True)
        if text.endswith(_REPLACEMENT):  # perhaps the first bytes of a code point
            certain = text.rstrip(_REPLACEMENT)
            piece = certain[self._num_sent :]
            self._num_sent += len(piece)
            return self._filter.push(piece)
        piece = text[self._num_sent :]
        self._num_sent = len(text)
        if piece:
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_sent = len(self._decode(self._window, skip_special_tokens=True))
        return self._filter.push(piece)

    def flush(self) -> str:
        """The text held back, at the end of the answer."""
        text = self._decode(self._window, skip_special_tokens=True)
        piece = text[self._num_sent :]
        self._num_sent = len(text)
        return self._filter.push(piece) + self._filter.flush()


class StopFilter:
    """Passes text on up to the first stop string to be complete; how the text is cut into pieces changes nothing."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        # Every beginning of a stop string, the longest first.
        beginnings = {text[:length] for text in stop for length in range(1, len(text))}
        self._beginnings = tuple(sorted(beginnings, key=len, reverse=True))
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What of the held text and `text` cannot be part of a stop string any more."""
        if self.stopped:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        # The one that ends first; of several the longest, so that nothing of any of them is shown.
        found = min(
            ((at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0),
            default=None,
        )
        if found is not None:
            self.stopped = True
            self._held = ""
            return text[: found[1]]
        self._held = next((part for part in self._beginnings if text.endswith(part)), "")
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        """The text held back; it was no stop string after all."""
        held, self._held = self._held, ""
        return held
