"""The stages of `prepare`, in their order."""

from lory_jax.preparation.engine.work import Stage
from lory_jax.preparation.stages import (
    balance,
    cluster,
    deduplicate,
    encode,
    evaluation,
    finish,
    fit,
    order,
    plan,
    read,
    select,
    split,
)

STAGES: tuple[Stage, ...] = (
    Stage("plan", plan.count, plan.run),
    Stage("read", read.count, read.run, read.describe),
    Stage("deduplicate", deduplicate.count, deduplicate.run),
    Stage("split", split.count, split.run),
    Stage("select", read.count, select.run, read.describe),
    Stage("fit", fit.count, fit.run),
    Stage("encode", read.count, encode.run, read.describe),
    Stage("cluster", cluster.count, cluster.run),
    Stage("assign", read.count, cluster.run_assign, read.describe),
    Stage("balance", balance.count, balance.run),
    Stage("order", order.count, order.run),
    Stage("evaluation", evaluation.count, evaluation.run),
    Stage("finish", finish.count, finish.run),
)
