"""Calls llama.cpp's quantizer once; a program of its own because llama.cpp aborts where a library should raise.

`python -m gemma_tune.exporting.gguf.quantize_worker SOURCE OUTPUT FTYPE THREADS BUFFER_BYTES` writes a line `progress N
TOTAL` when it begins tensor N, and llama.cpp's warnings and errors as they are. The exit code is llama.cpp's.

It ends with its stdin: then whoever started it was killed, and another may begin to write the same file.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from pathlib import Path

PROGRESS_WORD = "progress"
_TENSOR_LINE = re.compile(r"\[ *(\d+)/ *(\d+)\]")
# `ggml_log_level` of ggml.h.
_WARNING, _ERROR = 3, 4


def quantize(source: Path, output: Path, *, ftype: int, num_threads: int, buffer_bytes: int) -> int:
    """Run llama_model_quantize; 0 when it succeeded."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: object) -> None:
        line = text.decode("utf-8", errors="replace")
        tensor = _TENSOR_LINE.match(line)
        if tensor:
            _tell(f"{PROGRESS_WORD} {tensor[1]} {tensor[2]}\n")
        elif level in (_WARNING, _ERROR):
            _tell(line.rstrip("\n") + "\n")

    # `log` must outlive the call: llama.cpp crashes on a callback that Python has collected.
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = ftype
    parameters.nthread = num_threads
    parameters.max_buf_size = buffer_bytes
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(parameters)))


def _tell(text: str) -> None:
    """Write to whoever started this program; without him there is nothing left to do."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        os._exit(1)


def _end_with_stdin() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def main(arguments: list[str]) -> int:
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    source, output, ftype, num_threads, buffer_bytes = arguments
    return quantize(
        Path(source), Path(output), ftype=int(ftype), num_threads=int(num_threads), buffer_bytes=int(buffer_bytes)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
