"""Calls llama.cpp's quantizer once, in a process of its own: llama.cpp aborts where a library should raise."""

import ctypes
import os
import re
import sys

from gemma_tune.machine.child import Send

_TENSOR_LINE = re.compile(r"\[ *(\d+)/ *(\d+)\]")
# `ggml_log_level` of ggml.h.
_WARNING, _ERROR = 3, 4


def quantize(send: Send, *, source: str, output: str, ftype: int, num_threads: int, buffer_bytes: int) -> int:
    """Run llama_model_quantize and return its code, 0 when it succeeded.

    Tensors begun and in all are sent as `done` and `total`; its warnings and errors are printed.
    """
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: object) -> None:
        line = text.decode("utf-8", errors="replace")
        tensor = _TENSOR_LINE.match(line)
        if tensor:
            send(done=int(tensor[1]), total=int(tensor[2]))
        elif level in (_WARNING, _ERROR):
            sys.stderr.write(line.rstrip("\n") + "\n")

    # `log` must outlive the call: llama.cpp crashes on a callback that Python has collected.
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = ftype
    parameters.nthread = num_threads
    parameters.max_buf_size = buffer_bytes
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(parameters)))
