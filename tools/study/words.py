"""What the study's pages say about how it was made and how to read it: lists of sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

# How the ladder counts parameters.
COUNTED = {"active": "with all active parameters", "inner": "without embedding and head"}
SUBJECT = (
    "This page tests what the paper and others claim about Lory, at a scale that one machine can "
    "train, with several seeds and intervals. Claims were written down before their runs; the "
    "notes name the exceptions, and what was added later. The tables are about the test set. When "
    "no claim is pending any more, all are tested once more on the confirmation set: other "
    "documents, by which nothing in these tables was chosen (tools/study/report.py)."
)

READING = [
    "Effects are in nats per token, the mean of the domains: 0.01 nats are about 1 % of "
    "perplexity. A negative effect favours what the claim names first, with these exceptions. A "
    "positive one supports the claims `specialisation` and `size`. `prompt_routing` and "
    "`across_documents` claim equality; above zero, routing by the prompt is worse, and Lory "
    "gains more where attention stays inside documents.",
    "Losses count the positions from T on, where every segment is routed by an earlier one; T is "
    "the length of a segment, E the number of experts, and D the width of the model. In "
    "arms whose names end with _t and the length of their segments, they count from 128 on, so "
    "these are compared with one another only.",
    "Losses in the table of arms are means over the seeds of each arm, which may not be the same. "
    "Seeds of one arm often differ by 0.02 to 0.05 nats, so only differences over the same seeds, "
    "as in the claims, compare two arms. Arms whose names begin with sparse_ are those of "
    "docs/evaluation.md, and those of the arms beyond the paper are in docs/beyond.md.",
    "Intervals (95 %) cover two sources of uncertainty: the noise between seeds, and which folders "
    "of these packages were held out. Both variances are estimated, from few seeds and few "
    "folders, and intervals and p-values allow for that (tools/study/statistics.py). With three or "
    "four seeds, intervals tend to be too wide rather than too narrow. They are not adjusted for "
    "the number of claims, so one may exclude zero although its claim is inconclusive.",
    "P-values are two-sided. Those in the tables of claims are adjusted by Holm's method over all "
    "claims that the study plans to test on the same corpus; the second corpus is a family of its "
    "own. Those in the tables by domain and on parts of the instances are not adjusted.",
    'A claim of a difference is "equivalent" if its whole unadjusted interval lies within 0.01 '
    'nats of zero. Otherwise it is "supported" or "contradicted" if its adjusted p is below 0.05, '
    'and else "inconclusive". A claim is "pending" until all its seeds are trained and measured, '
    'and "not testable here" if no run of this study can test it.',
    "A claim about every domain shows the effect and interval of the mean, and the p of the "
    "domain with the weakest evidence. A claim of equality is tested against differences of 0.01 "
    "nats, not against zero.",
    '"Expert cosine" is the mean cosine between the weights of two experts of a layer, over all '
    "pairs and layers: 1 for copies.",
    '"Experts used" is the share of all pairs of layer and expert whose weight was above 2 / E at '
    'least once in the last ten training steps. For sparse models, "experts a token" is the mean '
    'over the run, and "MaxVio" is the largest load of an expert divided by the mean load, minus '
    "1, over the last tenth of the steps; runs before 2026-11-30 did not record them.",
]

LIMITS = [
    "The models are tiny, and see few tokens. What holds here need not hold at the paper's scale.",
    "A context holds one or two documents, so there is little that the order of documents could "
    "do. One order by similarity is compared with one random order, and another order moves a run "
    "by as much as another seed (0.03 nats), which the intervals leave out.",
    "{folders}. So the intervals of the first corpus are wide, however many seeds there are.",
    "Settings are chosen with one seed on 256 instances of each domain, which come from a few "
    "folders, and neighbouring learning rates often differ by less than two seeds do.",
    "For some families the best start is the smallest or largest that was tried "
    "(docs/study.json), and no further one was: ReMoE's 0.1, and 0.354 of Lory without dense "
    "warm-up and of the uniform merge. They may be better than they look.",
    "The short trials of dense, Lory and its two variants do not say which order of the documents "
    "they trained on, and five of them come from another machine; orders differ between machines.",
    "Nothing is tuned on the second corpus: every arm has the settings of the first there. "
    "Near-duplicates of training text were looked for on the first corpus only.",
    "Specialisation is measured on validation, and its interval covers seeds alone.",
    "The prompt of prompt routing is the first 32 tokens of an instance, often of another "
    "document, while the paper's are the demonstrations of a task.",
    "Four seeds are too few to show that Lory's gain is the same with and without attention "
    "across documents to within 0.01 nats.",
]

METHOD = [
    "The model has four layers of width 32 and contexts of 256 tokens in segments of 32 "
    "(tools/study/recipe.py), and sees 6.1M tokens. A run takes two to six minutes of one core.",
    "The first corpus is code, headers, stubs and documentation of Python packages with pinned "
    "versions (tools/study/corpus.py). The second is manual pages, documentation, prose and C "
    "from Debian packages (tools/debian_corpus.py).",
    "Every family of models is tuned on validation alone (the first 256 instances of a domain): "
    "12 trials of 400 steps, then trials of full length with 1, 1/2 and 1/4 of the best learning "
    "rate. If the highest or the lowest of these wins, one further out (2 or 1/8) is tried. The "
    "trials have one seed each.",
    "An arm has the best settings of the family that it is named after or tuned as, and changes "
    "what its row in the table of arms says. Arms that change the number of experts or of steps, "
    "the length of segments, the order of documents or the mask, and prefix routing, keep the "
    "settings tuned for dense or Lory.",
    "Dense, Lory and Lory with redrawn experts have ten seeds: the baseline, the paper's recipe, "
    "and the recipe with the lowest validation loss.",
    "All runs of arms on a corpus train on one order of its documents by similarity, or on one "
    "random order where their names say so (tools/study/order.py).",
    "FLOPs per token are those of the steps with experts. The dense warm-up, 5 % of the steps if "
    "nothing else is said, costs what a dense model costs. So Lory's total is 0.3 % lower than "
    "this figure times the tokens.",
    "Each batch is computed as two microbatches, and tokens compete for experts only with tokens "
    "of their own microbatch.",
]

ABOUT_FACTORS = (
    "This section will show what dense warm-up, the router's start and the learning rate do "
    "together: two values of each, in all combinations."
)
ABOUT_THE_LADDER = (
    "The ladder is a series of models of several widths, numbers of experts and numbers of tokens. "
    "From it, this section will estimate how many times as many parameters a dense model needs to "
    "reach Lory's loss."
)
LADDER = [
    "The ladder's models have widths of 16 to 96 and 0 to 32 experts, and see 3.1M or 6.1M tokens.",
    "Their losses are fitted by c(tokens) + a N^-(alpha - gamma ln E) E^-delta, where N are the "
    "active parameters in units of 100,000 and E the experts. The lack of fit is the standard "
    "deviation by which the losses miss this law beyond the noise of seeds.",
    "Learning rate and start were tuned on the dense model of every width at 6.1M tokens; at 3.1M "
    "tokens, all models have twice that rate.",
    "Most points have one seed, those of the far ends three, and those that other stages made up "
    "to ten. Most of what a seed does, it does to all points alike; intervals allow for that.",
    '"Extrapolated" are multipliers that compare with a dense model larger than any that was '
    "trained.",
    "A multiplier above 1 that does not change with the width still means a gain in nats that "
    "shrinks as models grow, because their losses come closer together.",
]


def unfinished(missing: Sequence[str], diverged: Sequence[str]) -> list[str]:
    """Why a table is not there."""
    said = [f"It waits for runs of {len(missing)} arms."] if missing else []
    return said + with_diverged(diverged)


def with_diverged(arms: Sequence[str]) -> list[str]:
    return (
        [f"Runs of these arms diverged, so they have no figures: {', '.join(arms)}."]
        if arms
        else []
    )


def at_bounds(ladder: Mapping[str, Any]) -> list[str]:
    """Where the ladder's fit ran into a bound, so that its law is no estimate."""
    said = []
    for count, law in ladder.get("laws", {}).items():
        counted = COUNTED[count].capitalize()
        if law["at_bound"]:
            names = ", ".join(law["at_bound"])
            said.append(
                f"{counted}, the fit ended at its bound of {names}: these are no estimates."
            )
        if law["draws_at_bound"]:
            share = law["draws_at_bound"]
            said.append(
                f"{counted}, {share:.1%} of the fits that make the intervals ended at a bound."
            )
    return said
