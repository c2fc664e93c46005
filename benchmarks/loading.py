"""Compare the peak memory of `load_model` with the size of the weights: `python benchmarks/loading.py`.

Writes a random bfloat16 Llama of about 0.5 billion parameters to a temporary folder, loads it in new processes in bfloat16 and in
float32, and samples the memory of the processes: the total, and the anonymous part (the operating system can drop pages of the
mapped checkpoint at any time).
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
    """Resident memory of this process in bytes: in total ("VmRSS"), and without mapped files ("RssAnon")."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "RssAnon:")}


def load(folder: str, dtype: str) -> None:
    """Load the model and print, as JSON, the peak memory above that at the start and the size of the weights."""
    from tn_lens import load_model

    load_model("toy")  # so that lazy imports are not measured
    start, done = memory(), threading.Event()
    peak = dict.fromkeys(start, 0)

    def sample() -> None:
        while not done.is_set():
            for kind, resident in memory().items():
                peak[kind] = max(peak[kind], resident - start[kind])
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    model = load_model(folder, dtype=dtype)
    done.set()
    thread.join()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    print(json.dumps({"weights": sum(storages.values()), **peak}))


def main() -> None:
    """Write the checkpoint, load it in a separate process for each dtype, and print the ratios."""
    if len(sys.argv) > 1:
        load(*sys.argv[1:])
        return
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from scripts.train_toy import build_tokenizer

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
            measured = json.loads(done.stdout.strip().splitlines()[-1])
            ratios = {kind: measured[kind] / measured["weights"] for kind in ("VmRSS", "RssAnon")}
            print(
                f"{dtype}: weights {measured['weights'] / 2**20:.0f} MiB; peak above the start: {ratios['VmRSS']:.2f} times "
                f"the weights, {ratios['RssAnon']:.2f} times without the mapped file"
            )


if __name__ == "__main__":
    main()
