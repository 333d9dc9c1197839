"""What people would write instead: the same networks in PyTorch behind FastAPI, with a FAISS index. Run by uvicorn, measured by `make bench`.

Small and fair: the pictures come decoded, as to Triton; no gradient is kept; `CXR_PEER_AT_ONCE` requests compute at a time with
`CXR_PEER_THREADS` threads each, of which the bench takes the best of three settings. The networks are built anew with random weights:
the shipped ones have their batch norms folded away, which is part of what an export gains, and time does not depend on a weight's value.
"""

from __future__ import annotations

import os
from threading import Semaphore
from typing import Any

import faiss
import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, VECTOR_SIZE, blended
from cxr_retrieval_training.config import EmbedderConfig, config_path, load_config
from cxr_retrieval_training.embedding.embedder import AttentionMapHead
from cxr_retrieval_training.embedding.train_embedder import build_embedder
from cxr_retrieval_training.segmentation.segmenter import LungSegmenter

torch.manual_seed(0)
torch.set_num_threads(int(os.environ["CXR_PEER_THREADS"]))
at_once = Semaphore(int(os.environ["CXR_PEER_AT_ONCE"]))
segmenter = LungSegmenter().eval()
embedder = build_embedder(load_config(config_path("embedder"), EmbedderConfig), (128, 192)).eval()
attention_map = AttentionMapHead().eval()
gallery = np.random.default_rng(0).normal(size=(int(os.environ["CXR_PEER_GALLERY"]), VECTOR_SIZE)).astype(np.float32)
faiss.normalize_L2(gallery)
index: Any = faiss.IndexFlatIP(VECTOR_SIZE)
index.add(gallery)
app = FastAPI()


@app.get("/ready")
def ready() -> bool:
    """Answers once everything is loaded."""
    return True


@app.post("/query")
async def query(request: Request) -> dict[str, list[float]]:
    """One radiograph as 256×256 bytes → similarity of its ten nearest and their numbers."""
    pixels = np.frombuffer(await request.body(), np.uint8).reshape(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return await run_in_threadpool(_answer, pixels)


@torch.inference_mode()
def _answer(pixels: Any) -> dict[str, list[float]]:
    with at_once:
        mask, lungs, _ = segmenter(torch.from_numpy(pixels.copy()))
        embedding, appearance, _, attention = embedder(lungs)
        attention_map(attention, mask)
        similarity, nearest = index.search(np.nan_to_num(blended(embedding.numpy(), appearance.numpy(), DEFAULT_BALANCE)), 10)
    return {"similarity": similarity[0].tolist(), "nearest": nearest[0].tolist()}
