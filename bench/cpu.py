"""bench/gpu.py at a size for a CPU: it tests the benchmark itself, its times say nothing about a GPU.

    python bench/cpu.py [--parts checks,steps] [--out DIR]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu  # noqa: E402

SMALL_MODEL = {
    "vocab_size": 64, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 2, "rope_dims": 4, "train_seq_len": 64,
    "eval_seq_len": 64, "train_batch_tokens": 1024, "micro_batch_tokens": 1024, "val_batch_tokens": 4096, "ttt_lora_rank": 4,
    "ttt_chunk_size": 16, "ttt_eval_seq_len": 64, "ttt_batch_size": 8, "global_ttt_chunk_tokens": 256,
}
SMALL = gpu.Sizes(
    settings=SMALL_MODEL, steps=2, check_tokens=200, data_tokens=60_000, document_tokens=50.0, ttt_lengths=(24, 60), square=128,
    ttt_cache_batches=(4, 8), ttt_cache_chunks=(4, 16),
    run_settings={"iterations": 6, "max_wallclock_seconds": 0, "warmup_steps": 1, "val_loss_every": 0, "train_log_every": 2,
                  "gptq_calibration_batches": 2, "phased_ttt_prefix_docs": 16})

if __name__ == "__main__":
    sys.exit(gpu.main(SMALL, Path(__file__).resolve()))
