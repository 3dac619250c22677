"""multipart/form-data (RFC 7578), as far as an upload of images needs it: parts of a body, by name, whole in memory."""

import re
from dataclasses import dataclass
from email.parser import BytesHeaderParser

# RFC 2046: 1 to 70 of these, not ending in a space.
BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
MAX_HEADER_BYTES = 4096


class FormError(ValueError):
    """Bytes that are not one whole form."""


@dataclass(frozen=True)
class Part:
    """One part of a form: a file or the text of a field."""

    name: str
    content: bytes


def split_form(body: bytes, boundary: str, max_parts: int) -> list[Part]:
    """The parts of a form, in order. Raises FormError for a malformed body, or more parts than `max_parts`."""
    delimiter = b"\r\n--" + boundary.encode()
    # The first delimiter may stand at the very beginning. Split no further than needed: the client chose the boundary.
    preamble, *chunks = (b"\r\n" + body).split(delimiter, max_parts + 2)
    if preamble.strip() or not chunks or len(chunks) > max_parts + 1 or not chunks[-1].startswith(b"--"):
        raise FormError
    return [_part(chunk) for chunk in chunks[:-1]]


def _part(chunk: bytes) -> Part:
    padding, newline, rest = chunk.partition(b"\r\n")
    headers, blank, content = rest.partition(b"\r\n\r\n")
    if padding.strip() or not newline or not blank or len(headers) > MAX_HEADER_BYTES:
        raise FormError
    message = BytesHeaderParser().parsebytes(headers)
    name = message.get_param("name", header="content-disposition")
    encoding = message.get("content-transfer-encoding", "binary").lower()
    if message.get_content_disposition() != "form-data" or not isinstance(name, str):
        raise FormError
    if encoding not in ("binary", "8bit", "7bit"):
        raise FormError
    return Part(name, content)
