"""Peak memory of `load_model` against the weights it loads: `python benchmarks/loading.py`.

Writes a random bfloat16 Llama of about 0.5 billion parameters to a temporary folder, loads it in fresh processes in its own
dtype and in float32, and samples their memory: all of it, and the anonymous part (pages of the mapped checkpoint can be
dropped at any time).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def memory() -> dict[str, int]:
    """Resident bytes of this process: "VmRSS" in all, "RssAnon" without mapped files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "RssAnon:")}


def load(folder: str, dtype: str) -> None:
    """Load and print the peaks above the start, and the size of the weights, as JSON."""
    from tn_lens import load_model

    load_model("toy")  # everything that is imported lazily
    start, done = memory(), threading.Event()
    peak = dict.fromkeys(start, 0)

    def sample() -> None:
        while not done.is_set():
            for kind, held in memory().items():
                peak[kind] = max(peak[kind], held - start[kind])
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    model = load_model(folder, dtype=dtype)
    done.set()
    thread.join()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    print(json.dumps({"weights": sum(storages.values()), **peak}))


def main() -> None:
    """Make the checkpoint, load it in a process of its own, print the ratio."""
    if len(sys.argv) > 1:
        load(*sys.argv[1:])
        return
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tn_lens.toy.train import build_tokenizer

    config = LlamaConfig(
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        for dtype in ("bfloat16", "float32"):
            command = [sys.executable, "-W", "ignore", __file__, folder, dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            ratios = {kind: found[kind] / found["weights"] for kind in ("VmRSS", "RssAnon")}
            print(
                f"{dtype}: weights {found['weights'] / 2**20:.0f} MiB; peak above the start {ratios['VmRSS']:.2f} times "
                f"the weights, {ratios['RssAnon']:.2f} without the mapped file"
            )


if __name__ == "__main__":
    main()
