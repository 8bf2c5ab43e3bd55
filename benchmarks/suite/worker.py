"""sentence-transformers' ONNX backend in a Python of its own, whose transformers is an older one.

    python worker.py MODEL BATCH_SIZE

A line of JSON with texts in, the bytes of their vectors in float32 out. Imports nothing of ours.
"""

import json
import os
import sys

import numpy as np

if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    from sentence_transformers import SentenceTransformer

    options = {"export": True, "file_name": "none"}  # made anew, never read from elsewhere
    whole = SentenceTransformer(sys.argv[1], backend="onnx", device="cpu", model_kwargs=options)
    model = SentenceTransformer(modules=list(whole.children())[:2], device="cpu", backend="onnx")
    for line in sys.stdin:
        vectors = model.encode(json.loads(line), batch_size=int(sys.argv[2]))
        out.write(np.asarray(vectors, dtype=np.float32).tobytes())
        out.flush()
