from megatron_xy import device; device.start(num_threads=1)
import sys, time
sys.path.insert(0, "/work/main")
from tests.distributed import test_recompute as t, models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks
from megatron_xy.config import ModelConfig
import torch

def go(layout, modules):
    from megatron_xy.model import build
    from megatron_xy import mcore
    plain = mcore.TransformerConfig
    def conf(**kw):
        if kw.get("recompute_granularity") == "selective" and modules:
            kw["recompute_modules"] = list(modules)
        return plain(**kw)
    mcore.TransformerConfig = conf
    model = models.MODEL
    models.MODEL = ModelConfig(num_layers=4, hidden_size=256, ffn_hidden_size=688, num_attention_heads=4, num_query_groups=2, vocab_size=500, max_position_embeddings=256)
    t.train(layout, "selective" if modules else "none")
    b = time.perf_counter()
    r = t.train(layout, "selective" if modules else "none")
    r["s"] = time.perf_counter() - b
    return r
def main():
    for layout in (Layout(), Layout(tp=2, sp=True)):
        for modules in ((), ("core_attn",), ("mlp",), ("core_attn","mlp")):
            r = run_ranks(go, layout, modules, world_size=layout.world_size)[0]
            print(layout, modules, r["kept"], round(r["s"],2), r["curve"][-1], flush=True)
if __name__ == "__main__":
    main()
