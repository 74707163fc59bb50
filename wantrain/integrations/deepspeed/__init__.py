"""DeepSpeed's pipelines: their layers as a wantrain job, and wantrain's codecs in their sends.

    profile(module, inputs)                  what a PipelineModule's layers cost, for `wt.make_plan`
    job(module, plan)                        its layers, loss and ties, for `wt.Trainer`
    compress(engine, forward="aqsgd:4", …)   an engine's sends through codecs, its schedule as it is

DeepSpeed is imported where it is used: this package's name is its own.
"""

from wantrain.integrations.deepspeed.compression import Compression, compress
from wantrain.integrations.deepspeed.costs import profile
from wantrain.integrations.deepspeed.layers import Job, job

__all__ = ["Compression", "Job", "compress", "job", "profile"]
