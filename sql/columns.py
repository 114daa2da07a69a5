"""What every column of a view means there: the one definition, beside the SQL that computes it.

The comments in canopy.duckdb, the data dictionary and the report derive from it.
"""

from __future__ import annotations

from dataclasses import replace

from canopy_store.schema import COLUMNS, TABLES, Column, view_columns


def _c(name: str, doc: str, unit: str = "", type: str = "DOUBLE") -> Column:
    return Column(name, type, doc, unit)


def _count(name: str, doc: str, unit: str = "") -> Column:
    return _c(name, doc, unit, "BIGINT")


# Columns that mean the same in every view that has them. Definitions: docs/measures.md.
METRICS: tuple[Column, ...] = (
    _c(
        "content_entropy_sum",
        "entropy_sum - stop_entropy_sum: what to say, given that the rollout goes on.",
        "nats",
    ),
    _c(
        "semantic_distance",
        "1 - mean cosine similarity to the prompt's other rollouts in the selection; NULL of one.",
    ),
    _c("gen_ppl", "exp(ce_star / mean_length), both of this row."),
    _c("branching_factor", "exp(entropy_rate), of this row."),
    _c(
        "canopy_size_log10",
        "log10 of exp(ce_star), ce_star of this row: the effective number of rollouts.",
        "powers of ten",
    ),
    _c("length_rate_product", "E[N] · E[r]: mean_length times entropy_rate of model_metrics.", "nats"),
    _c("cov_within", "Mean over prompts of the population covariance of N and r.", "nats"),
    _c("cov_between", "Population covariance over prompts of E[N|X] and E[r|X].", "nats"),
    _c("position", "Step of the rollout, from 1.", "tokens", "INTEGER"),
    _c(
        "mean_entropy",
        "Mean over active rollouts of the step's entropy under the run's own policy.",
        "nats",
    ),
    _c(
        "mean_entropy_rate",
        "Mean over active rollouts of the entropy rate up to the position t: (h_1 + … + h_t) / t.",
        "nats per token",
    ),
    _c("stop_probability", "Mean over active rollouts of the probability of ending at the position."),
    _count("stopped", "Active rollouts that did end by themselves at the position."),
    _c("tercile", "Length tercile within the prompt: short, medium or long.", type="VARCHAR"),
    _c("D", "The prompt's semantic_diversity, as the regressions call it."),
    _c("R_bar", "The prompt's entropy_rate, as the regressions call it.", "nats per token"),
    _c("N_bar", "The prompt's mean_length, as the regressions call it.", "tokens"),
    _c("vendi_share", "The prompt's vendi_score / n_rollouts: a share, at most 1."),
    _c(
        "vendi_norm",
        "The prompt's (vendi_score - 1) / (n_rollouts - 1): 0 where all rollouts are one, 1 where none "
        "is like another. NULL with one rollout.",
    ),
    _c(
        "var_R",
        "Squared standard error of R_bar: the sample variance of its rollouts' rates over their number; "
        "NULL of one.",
        "(nats per token)²",
    ),
    _c("var_N", "Squared standard error of N_bar; NULL of one rollout.", "tokens²"),
    _c(
        "cov_RN",
        "Covariance of the errors of R_bar and N_bar, which come from the same rollouts; NULL of one.",
        "nats",
    ),
    _c(
        "cov_RD",
        "Covariance of the errors of R_bar and D: 2 (n - 1) / (n - 2) / n times the sample covariance "
        "of entropy_rate and semantic_distance over the n rollouts; NULL of fewer than 3.",
        "nats per token",
    ),
    _c("cov_ND", "Covariance of the errors of N_bar and D, as cov_RD; NULL of fewer than 3.", "tokens"),
    _c(
        "reliability",
        "Of R_bar, over all rows of the variant, embedder and selection: 1 - mean var_R / variance of "
        "R_bar (divisor rows - 1); the same in each of them. NULL where there is one row, or where "
        "R_bar or its error is not defined.",
    ),
    _c("z", "mean_excess in standard errors: Student's t, n_rollouts - 1 degrees of freedom."),
    _c("p", "Two-sided p of z; NULL of one rollout, and where the excess is the same in all."),
    _c(
        "ok",
        "p is at least 5.7e-7, five standard errors of a normal; where there is no p, the excess must "
        "be 0.",
        type="BOOLEAN",
    ),
    _c(
        "diversity_number",
        "1 / squared_similarity: the order-2 number of distinct rollouts, the same in expectation "
        "however many are sampled; NULL where no two resemble each other.",
    ),
    _c("same_policy", "Scored under the policy that the run was sampled with.", type="BOOLEAN"),
    _c(
        "scorer_logprob",
        "Per step, log-probability of the token under scorer and policy; -inf outside the policy's "
        "support.",
        "nats",
        "FLOAT[]",
    ),
    _c("scorer_entropy", "Per step, entropy of the scorer's policy.", "nats", "FLOAT[]"),
    _c(
        "scorer_surprisal_sum",
        "Sum of -scorer_logprob over the rollout; infinite where a token is outside the policy's "
        "support.",
        "nats",
    ),
    _c("scorer_entropy_sum", "Sum of scorer_entropy over the rollout.", "nats"),
    _c("log_ratio", "log p - log q of the rollout: p the run's policy, q the scorer's.", "nats"),
    _c(
        "kl_se_prompts",
        "Standard error of kl over prompts: what other prompts would change, too.",
        "nats",
    ),
)

# Views that show the columns of another relation, row by row.
_PASSED = {
    "selected_rollouts": "rollouts",
    "rollout_metrics": "selected_rollouts",
    "scored_rollouts": "selected_rollouts",
    "panel": "prompt_metrics",
    "truncation": "runs",
    "document_metrics": "documents",
    "perplexity": "documents",
    "item_metrics": "items",
    "option_accuracy": "items",
    "forgetting": "documents",
    "paired_documents": "documents",
    "token_type_contributions": "documents",
    "number_formats": "documents",
    "collapse": "model_metrics",
}


# What an engine may have logged or not: a run's scores complete it in the views.
_LOGGED = {
    "logprob",
    "entropy",
    "eos_logprob",
    "entropy_sum",
    "surprisal_sum",
    "stop_entropy_sum",
}


def _completed(recorded: Column) -> Column:
    doc = recorded.doc.partition("; NULL")[0].removesuffix(".")
    scored = "where the engine gave none, from scores under the run's own model and policy"
    return replace(recorded, doc=f"{doc}; {scored}.")


_SUBSET = "of a selection other than 'all' the mean of that subset, and no entropy"
_SECOND = "over 'all' a second estimate of what ce_star estimates"
_OVER = "{} of n_tokens and {} over the prompt's rollouts; NULL where one is constant."
_COVARIANCE = "Sample covariance of n_tokens and {} over the prompt's rollouts; NULL of one."
_FISHER = "The prompts' {} pooled: Fisher's z, weighted by n_rollouts - 3, transformed back."
_BY_PAIRS = "Mean over prompts of their {}, weighted by pairs of rollouts."
_BY_FREEDOM = "Mean over prompts of their {}, weighted by n_rollouts - 1."
_ACTIVE = "Rollouts of the run in the selection that reach the position"
_SCORED = "Scored rollouts of the {} in the selection, those counted in n_outside included."
_OUTSIDE = (
    "with a token outside the scorer's support: above 0, cross-entropy and divergence are infinite, "
    "and the means here leave these out."
)
_GRADED = "Rollouts of the prompt in the selection that the grader calls right or wrong."
_SAME_PROMPTS = "these prompts given: what other rollouts of them would change."
_RHOS = (
    ("pearson", "Pearson correlation", _FISHER),
    ("spearman", "Spearman correlation (mid-ranks)", _FISHER),
    ("kendall", "Kendall's tau-b", _BY_PAIRS),
)
_SIDES = (("rho", "entropy rate"), ("rho_length_diversity", "semantic_distance"))

_BASELINE = _c("baseline_id", "A plain scorer of the family's variant base.", type="VARCHAR")

# What an option is chosen by.
_CHOICES = {
    "sum": ("logprob_sum", ""),
    "token": ("logprob_sum / n_tokens", "; NULL where n_tokens is not known"),
    "char": ("logprob_sum / n_chars", "; NULL where an option has no characters"),
    "pmi": ("logprob_sum - neutral_sum", "; NULL where no neutral prompt was given"),
}

# What a view's columns mean where that is the view's own.
VIEW_DOCS: dict[str, tuple[Column, ...]] = {
    "selected_rollouts": tuple(_completed(c) for c in TABLES["rollouts"].columns if c.name in _LOGGED),
    "rollout_metrics": (
        _c("entropy_rate", "r_i: entropy_sum / n_tokens of the rollout.", "nats per token"),
    ),
    "prompt_metrics": (
        _count("n_rollouts", "Rollouts of the prompt in the selection."),
        _count("n_tokens", "Generated tokens of the prompt's rollouts in the selection.", "tokens"),
        _c(
            "ce_star",
            "CE*: mean entropy_sum of the prompt's rollouts, the estimate of H(N, Y | X = x); "
            f"{_SUBSET}.",
            "nats",
        ),
        _c(
            "surprisal_mean",
            f"Mean surprisal_sum of the prompt's rollouts: {_SECOND}; NULL where a rollout has none.",
            "nats",
        ),
        _c("mean_length", "Mean n_tokens of the prompt's rollouts.", "tokens"),
        _c(
            "entropy_rate",
            "Mean over the prompt's rollouts of their own entropy rate, entropy_sum / n_tokens.",
            "nats per token",
        ),
        *(
            _c(f"{side}_{kind}", _OVER.format(named, other))
            for side, other in _SIDES
            for kind, named, _ in _RHOS
        ),
        _c("cov_length_rate", _COVARIANCE.format("entropy rate"), "nats"),
        _c("var_length", "Sample variance of n_tokens over the prompt's rollouts; NULL of one."),
        _c("var_rate", "Sample variance of entropy rate over the prompt's rollouts; NULL of one."),
        _c(
            "squared_similarity",
            "Mean squared cosine similarity over pairs of the prompt's rollouts; NULL of one.",
        ),
        _c("cov_length_diversity", _COVARIANCE.format("semantic_distance"), "tokens"),
        _c(
            "truncation_rate",
            "Share of the prompt's rollouts cut at max_new_tokens; NULL where a finish_reason is "
            "unknown.",
        ),
        _c(
            "semantic_diversity",
            "1 - mean cosine similarity over pairs of the prompt's rollouts; NULL of one.",
        ),
        _c(
            "vendi_score",
            "exp of the Shannon entropy of the prompt's spectrum: the effective number of distinct "
            "rollouts.",
        ),
    ),
    "model_metrics": (
        _count("n_prompts", "Prompts of the run with a rollout in the selection."),
        _count("n_rollouts", "Rollouts of the run in the selection."),
        _count("n_tokens", "Generated tokens of the run's rollouts in the selection.", "tokens"),
        _c(
            "ce_star",
            f"CE*: mean over prompts of their ce_star, the estimate of H(N, Y | X); {_SUBSET}.",
            "nats",
        ),
        _c("surprisal_mean", f"Mean over prompts of their surprisal_mean: {_SECOND}.", "nats"),
        _c("mean_length", "Mean over prompts of their mean_length.", "tokens"),
        _c(
            "entropy_rate",
            "Mean over prompts of their entropy_rate, itself a mean over rollouts.",
            "nats per token",
        ),
        *(
            _c(f"{side}_{kind}", pooled.format(f"{side}_{kind}"))
            for side, _ in _SIDES
            for kind, _, pooled in _RHOS
        ),
        _c(
            "rho_pooled",
            "Sum over prompts of cov_length_rate / sqrt(sum of var_length * sum of var_rate): from few "
            "rollouts a prompt much less biased than rho_pearson; prompts weigh by their variances.",
        ),
        _c("cov_length_rate", _BY_FREEDOM.format("cov_length_rate"), "nats"),
        _c("squared_similarity", "Mean over prompts of their squared_similarity."),
        _c("cov_length_diversity", _BY_FREEDOM.format("cov_length_diversity"), "tokens"),
        _c("truncation_rate", "Mean over prompts of their truncation_rate."),
        _c("semantic_diversity", "Mean over prompts of their semantic_diversity."),
        _c("vendi_score", "Geometric mean over prompts of their vendi_score."),
    ),
    "graded_prompts": (
        _count("n_graded", _GRADED),
        _count("n_correct", "Of these the right ones."),
        _c("accuracy", "n_correct / n_graded: the chance that a rollout is right."),
        _c("mean_score", "Mean score of the graded rollouts; NULL where one has none."),
        _c(
            "no_answer",
            "Share of the graded rollouts in which no answer was found; NULL where the grader names "
            "none.",
        ),
    ),
    "pass_at_k": (
        _count("k", "Rollouts drawn: a power of two, or the most graded of a prompt of the run."),
        _count("n_graded", _GRADED),
        _count("n_correct", "Of these the right ones."),
        _c(
            "pass_at_k",
            "Chance that of k rollouts drawn without replacement one is right: 1 - C(n - c, k) / "
            "C(n, k) of n graded, c of them right; NULL where k > n.",
        ),
        _c("pass_hat_k", "Chance that all k are right: C(c, k) / C(n, k); NULL where k > n."),
    ),
    "model_pass_at_k": (
        _count("k", "Rollouts drawn: a power of two, or the most graded of a prompt of the run."),
        _count("n_prompts", "Prompts of the run with a graded rollout in the selection."),
        _count(
            "n_counted", "Of these the prompts with k graded rollouts or more, which the means are of."
        ),
        _c("pass_at_k", "Mean over prompts of their pass_at_k; at k = 1 the accuracy."),
        _c("pass_hat_k", "Mean over prompts of their pass_hat_k."),
    ),
    "ce_star_decomposition": (
        _c(
            "ce_star",
            "CE* of model_metrics, a mean over prompts: length_rate_product + cov_within + "
            "cov_between, and stop_entropy + content_entropy.",
            "nats",
        ),
        _c(
            "stop_entropy",
            "Mean over prompts of their rollouts' mean stop_entropy_sum: the part of ce_star that is "
            "about ending; NULL where a rollout has none.",
            "nats",
        ),
        _c(
            "content_entropy",
            "ce_star - stop_entropy: the part that is about what to say, given that the rollout goes "
            "on.",
            "nats",
        ),
    ),
    "entropy_trajectory": (_count("active", f"{_ACTIVE}."),),
    "eos_trajectory": (
        _count("active", f"{_ACTIVE}, of those with eos_logprob."),
        _c(
            "stop_entropy",
            "Mean over active rollouts of the binary entropy of ending at the position against going "
            "on.",
            "nats",
        ),
        _c(
            "content_entropy",
            "Mean over active rollouts of the entropy of the next token given that the rollout goes "
            "on, weighted by the chance of going on.",
            "nats",
        ),
    ),
    "length_terciles": (
        _count("n_rollouts", "Rollouts of the prompt in the tercile."),
        _c("mean_length", "Mean n_tokens of the tercile's rollouts.", "tokens"),
        _c(
            "entropy_rate",
            "Mean over the tercile's rollouts of their own entropy rate.",
            "nats per token",
        ),
        _c(
            "semantic_diversity",
            "1 - mean cosine similarity over pairs of the tercile's rollouts; NULL of one.",
        ),
    ),
    "model_length_terciles": (
        _count("n_prompts", "Prompts with a rollout in the tercile."),
        _count("n_rollouts", "Rollouts of all prompts in the tercile."),
        _c("mean_length", "Mean over prompts of the tercile's mean_length.", "tokens"),
        _c(
            "entropy_rate",
            "Mean over prompts of the tercile's entropy_rate, itself a mean over rollouts.",
            "nats per token",
        ),
        _c("semantic_diversity", "Mean over prompts of the tercile's semantic_diversity."),
    ),
    "logging_check": (
        _count("n_rollouts", "Rollouts of the run in the selection with logprob and entropy."),
        _c("mean_excess", "Mean over rollouts of surprisal_sum - entropy_sum.", "nats"),
        _c("sd", "Standard deviation over rollouts of that excess.", "nats"),
    ),
    "stop_check": (
        _count("n_rollouts", "Rollouts of the run in the selection with eos_logprob and finish_reason."),
        _c(
            "mean_excess",
            "Mean over rollouts of 1 where it ended by itself, else 0, less the sum over its steps of "
            "the probability of ending.",
        ),
        _c("sd", "Standard deviation over rollouts of that excess."),
    ),
    "truncation": (
        _count("n_rollouts", "Rollouts of the prompt in the selection."),
        _c(
            "truncation_rate",
            "Share of the prompt's rollouts cut at max_new_tokens; NULL where a finish_reason is "
            "unknown.",
        ),
        _c("ce_star", "CE* of prompt_metrics: of the rollouts as cut.", "nats"),
        _c(
            "ce_star_extrapolated",
            "A sensitivity, and no measure: ce_star + truncation_rate times the entropy over the "
            "probability of ending, both summed over the steps of the window's last half, as if what "
            "comes after the cap were like it.",
            "nats",
        ),
    ),
    "cross_entropy": (
        _count("n_rollouts", _SCORED.format("prompt")),
        _count("n_outside", f"Of the prompt's n_rollouts those {_OUTSIDE}"),
        _c(
            "cross_entropy",
            "Mean over the prompt's rollouts of -log q of the whole rollout, q the scorer's.",
            "nats",
        ),
        _c("cross_entropy_se", "Standard error of cross_entropy over the prompt's rollouts.", "nats"),
        _c(
            "kl",
            "Mean over the prompt's rollouts of log_ratio: over 'all' the estimate of "
            "KL(run || scorer) at this prompt; NULL where a rollout has no logprob.",
            "nats",
        ),
        _c("kl_se", "Standard error of kl over the prompt's rollouts.", "nats"),
    ),
    "kl_divergence": (
        _count("n_prompts", "Prompts of the run with a scored rollout in the selection."),
        _count("n_rollouts", _SCORED.format("run")),
        _count("n_outside", f"Of the run's n_rollouts those {_OUTSIDE}"),
        _c("cross_entropy", "Mean over prompts of their cross_entropy.", "nats"),
        _c("cross_entropy_se", f"Standard error of cross_entropy, {_SAME_PROMPTS}", "nats"),
        _c("kl", "Mean over prompts of their kl: over 'all' the estimate of KL(run || scorer).", "nats"),
        _c("kl_se", f"Standard error of kl, {_SAME_PROMPTS}", "nats"),
    ),
    "kl_trajectory": (
        _count("active", f"{_ACTIVE}, of those scored."),
        _count("n_outside", f"Of the active rollouts' steps here those {_OUTSIDE}"),
        _c("cross_entropy", "Mean over active rollouts of -log q of the step's token.", "nats"),
        _c(
            "kl",
            "Mean over active rollouts of log p - log q of the step's token: over 'all' the estimate "
            "of the step's KL(run || scorer); NULL where a rollout has no logprob.",
            "nats",
        ),
        _c("kl_se", "Standard error of kl over active rollouts.", "nats"),
    ),
    "item_metrics": (
        _count("n_options", "Options of the item."),
        _c("chance", "1 / n_options: what guessing gets."),
        *(
            _c(
                f"correct_{name}",
                f"1 where the right option has the largest {measure}, 0 where a wrong one has, 1 / k "
                f"where the right one is among k alike{when}.",
            )
            for name, (measure, when) in _CHOICES.items()
        ),
        _c("margin", "logprob_sum of the right option less that of the best wrong one.", "nats"),
        _c(
            "margin_token",
            "The same of logprob_sum / n_tokens; NULL where n_tokens is not known.",
            "nats per token",
        ),
        _c(
            "margin_pmi",
            "The same of logprob_sum - neutral_sum; NULL where no neutral prompt was given.",
            "nats",
        ),
    ),
    "option_accuracy": (
        _count("n_items", "Items of the split."),
        _count("n_clusters", "Clusters of these items."),
        _c("chance", "Mean over items of 1 / options: what guessing gets."),
        *(
            column
            for name, (measure, when) in _CHOICES.items()
            for column in (
                _c(
                    f"accuracy_{name}",
                    f"Mean over items of correct_{name}: the choice by {measure}{when}.",
                ),
                _c(
                    f"accuracy_{name}_se",
                    f"Standard error of accuracy_{name} over clusters; NULL of one.",
                ),
            )
        ),
        _c("margin", "Mean over items of their margin.", "nats"),
    ),
    "document_metrics": (
        _count("n_tokens", "Scored tokens of the document.", "tokens"),
        _count("n_bytes", "Bytes of the text of the scored tokens.", "bytes"),
        _c("nll_sum", "Sum of -logprob over the document's scored tokens.", "nats"),
        _c("entropy_sum", "Sum of entropy over the document's scored tokens.", "nats"),
        _c("nll", "nll_sum / n_tokens; NULL where no token is scored.", "nats per token"),
        _c("expected_nll", "entropy_sum / n_tokens: the nll that the model expected.", "nats per token"),
        _c("bits_per_byte", "nll_sum / n_bytes / ln 2: compares tokenizers.", "bits per byte"),
        _c("perplexity", "exp(nll)."),
    ),
    "perplexity": (
        _count("n_documents", "Scored documents of the split."),
        _count("n_clusters", "Clusters of these documents."),
        _count("n_tokens", "Scored tokens of these documents.", "tokens"),
        _count("n_bytes", "Bytes of the text of the scored tokens.", "bytes"),
        _c("nll", "Sum over documents of nll_sum / n_tokens of this row.", "nats per token"),
        _c("nll_se", "Standard error of nll over clusters; NULL of one.", "nats per token"),
        _c("expected_nll", "Mean over scored tokens of their entropy.", "nats per token"),
        _c("bits_per_byte", "Sum of nll_sum / n_bytes of this row / ln 2.", "bits per byte"),
        _c("perplexity", "exp(nll) of this row."),
    ),
    "forgetting": (
        _c("ancestor_variant", "Variant of the ancestor: the earlier stage.", type="VARCHAR"),
        _c("ancestor_scorer_id", "The ancestor's scorer, alike but for the model.", type="VARCHAR"),
        _c("distance", "Stages from the ancestor to the model; 1: its parent.", type="INTEGER"),
        _c("r", "R[t, i]: -nll of the corpus under the scorer.", "nats per token"),
        _c("r_ancestor", "-nll of the corpus under the ancestor.", "nats per token"),
        _c(
            "transfer",
            "r - r_ancestor: below 0 the corpus was forgotten since. NULL of another number of tokens.",
            "nats per token",
        ),
        _c(
            "transfer_per_byte",
            "The same per byte, across tokenizers. NULL of another number of scored bytes.",
            "nats per byte",
        ),
    ),
    "gain_forgetting": (
        _c("parent_variant", "Variant of the parent.", type="VARCHAR"),
        _c("parent_scorer_id", "The parent's scorer, alike but for the model.", type="VARCHAR"),
        _c("in_corpus", "Corpus that gain is of.", type="VARCHAR"),
        _c("in_split", "Split of in_corpus.", type="VARCHAR"),
        _c("out_corpus", "Corpus that forgetting is of: another one.", type="VARCHAR"),
        _c("out_split", "Split of out_corpus.", type="VARCHAR"),
        _c("gain", "nll of in_corpus under the parent less that under the child.", "nats per token"),
        _c("forgetting", "nll of out_corpus under the child less the parent's.", "nats per token"),
        _c("gain_per_byte", "gain per byte, across tokenizers.", "nats per byte"),
        _c("forgetting_per_byte", "forgetting per byte, across tokenizers.", "nats per byte"),
        _count("n_children", "Scorers of children of this parent that have this pair, this one too."),
        _c(
            "on_frontier",
            "Whether none of these has at least as much gain and at most as much forgetting, and one of "
            "the two better.",
            type="BOOLEAN",
        ),
    ),
    "collapse": (
        _c(
            "generation",
            "Generations of models behind the text that the checkpoint was trained on: that of its data "
            "set, 0 where this is given and no generator is named; of models where there is none.",
            type="INTEGER",
        ),
        _c("origin_id", "model_id of generation 0; NULL where it is not known.", type="VARCHAR"),
        _c(
            "writer_id",
            "model_id that wrote what the checkpoint was trained on; NULL where no model did.",
            type="VARCHAR",
        ),
        _c("temperature", "Sampling temperature of the run: the sign of ce_star depends on it."),
        _c("split", "Part of the corpus that nll and tail_nll are of.", type="VARCHAR"),
        _c(
            "nll",
            "Of the real text of the split, as in perplexity; NULL where it was not read.",
            "nats per token",
        ),
        _c("nll_rise", "nll less that of generation 0, over the same tokens.", "nats per token"),
        _count("n_tail_tokens", "Scored tokens of the split that are of the corpus's tail.", "tokens"),
        _c(
            "tail_nll",
            "Mean of -logprob over the split's tokens in the tail: the rarest of the corpus, those that "
            "are equally rare together, until they make up a tenth of its tokens.",
            "nats per token",
        ),
        _c("tail_nll_rise", "tail_nll less that of generation 0.", "nats per token"),
        _c(
            "rare_kept",
            "Of the pairs of words that the corpus has once or twice, the share that the run's texts "
            "have; NULL where texts were left out.",
        ),
        _c(
            "unseen",
            "Share of the run's pairs of words that no document of the corpus has; NULL where texts "
            "were left out.",
        ),
        _c(
            "origin_ppl",
            "exp(mean over prompts of -log p of a rollout under generation 0, temperature 1 and nothing "
            "cut off / mean_length); NULL where it has not scored the whole run.",
        ),
    ),
    "cost_per_token": (
        _c("device", "Devices that its shards ran on.", type="VARCHAR"),
        _count("n_shards", "Shards of the job."),
        _count("tokens", "Tokens sampled or read; NULL where a shard's are not known.", "tokens"),
        _c("seconds", "Sum over shards, side by side or not; NULL where one is not known.", "seconds"),
        _c("tokens_per_second", "tokens / seconds: of one worker.", "tokens per second"),
        _c("energy_method", "How energy_j was measured; every way where shards differ.", type="VARCHAR"),
        _c(
            "energy_j",
            "Measured energy: NULL unless every shard was measured, and in one way. Never modelled.",
            "joules",
        ),
        _c("joules_per_token", "energy_j / tokens.", "joules per token"),
    ),
    "paired_documents": (
        _BASELINE,
        _count("n_tokens", "Tokens of the document that both have scored.", "tokens"),
        _c("delta_sum", "Sum of delta: nll_sum less that of the baseline.", "nats"),
        _c("tokens", "The text of each scored token; NULL where left out.", type="VARCHAR[]"),
        _c(
            "delta",
            "Per scored token, -log-probability less that under the baseline: below 0, better.",
            "nats",
            "DOUBLE[]",
        ),
    ),
    "number_formats": (
        _c("baseline_id", "A plain scorer of the same weights.", type="VARCHAR"),
        _c("number_format", "Number format that is emulated.", type="VARCHAR"),
        _count("n_documents", "Documents of the split that both have scored."),
        _count("n_clusters", "Clusters of these documents."),
        _count("n_tokens", "Tokens that both have scored.", "tokens"),
        _c("delta_nll", "nll less that of the plain scorer.", "nats per token"),
        _c("delta_nll_se", "Standard error of delta_nll over clusters; NULL of one.", "nats per token"),
        _c("kl", "Mean over tokens of KL(plain || emulated), given the same tokens.", "nats per token"),
        _c("kl_se", "Standard error of kl over clusters; NULL of one.", "nats per token"),
        _c(
            "modelled_mj",
            "Modelled energy of the multiply-accumulates of a token; NULL where no source has it.",
            "millijoules per token",
        ),
        _c("modelled_mj_float32", "The same in float32.", "millijoules per token"),
        _c(
            "modelled_reading_mj",
            "Modelled energy of reading each weight once from DRAM, as at batch 1.",
            "millijoules per token",
        ),
    ),
    "token_type_contributions": (
        _BASELINE,
        _c(
            "token_type",
            "newline, space, number, punctuation, function word, content or rest, by token_type; of the "
            "macro by patterns, one of their types or rest.",
            type="VARCHAR",
        ),
        _count("n_tokens", "Tokens of the type that both have scored.", "tokens"),
        _c("delta_nll", "Mean over tokens of the type of delta.", "nats per token"),
        _c(
            "contribution",
            "c_v: sum of delta over tokens of the type / tokens of every type; they sum to total.",
            "nats per token",
        ),
        _c(
            "contribution_se",
            "Standard error of contribution over clusters of documents; NULL of one.",
            "nats per token",
        ),
        _count("n_clusters", "Clusters of the documents that both have scored."),
        _c("total", "nll less that of the baseline, over tokens of every type.", "nats per token"),
    ),
    "meanings": (
        _c("cluster", "Number of the cluster, from 0 in the order of first members.", type="INTEGER"),
        _count("n_rollouts", "Judged rollouts in the cluster."),
        _c("share", "n_rollouts over the prompt's judged rollouts."),
        _c(
            "class_logprob",
            "Log of the cluster's probability: the sum of the probabilities of its rollouts over that "
            "of all judged; NULL where one of these has no logprob.",
            "nats",
        ),
        _c("first_sample", "The cluster's first rollout.", type="INTEGER"),
        _count(
            "n_unlike",
            "Ordered pairs of the cluster's rollouts that were not judged alike.",
        ),
    ),
    "meaning_metrics": (
        _count("n_judged", "Rollouts of the prompt that were judged: m."),
        _count("n_meanings", "Clusters of these."),
        _c(
            "rse",
            "-Sum over clusters of share * ln(share), the relaxed semantic entropy: of at most ln m.",
            "nats",
        ),
        _c("rse_norm", "rse / ln m; NULL of one rollout."),
        _c(
            "semantic_entropy",
            "-Sum over clusters of p * ln p, p = exp(class_logprob); NULL where a judged rollout has no "
            "logprob.",
            "nats",
        ),
        _c(
            "discrete_semantic_entropy",
            "The same with p = share: rse by its other name.",
            "nats",
        ),
        _c("distinct_10", "Clusters among the first 10 judged rollouts; NULL of fewer."),
        _c(
            "utility_10",
            "Mean over the first 10 judged rollouts, weighted by 0.8^i, of 1 for the first of its "
            "cluster and 0 for another; NULL of fewer.",
        ),
        _count(
            "n_intransitive",
            "Pairs of rollouts in one cluster that were not judged alike.",
        ),
        _c(
            "labels",
            "The cluster of each judged rollout, by sample; distinct_k(labels, k) and utility_k(labels, "
            "k) take any k.",
            type="INTEGER[]",
        ),
    ),
}


def column_of(relation: str, name: str) -> Column:
    """The column as this table or view means it: name, type, unit and doc.

    A view's own meaning comes first, then one that holds everywhere; the column of another relation
    only where the view shows that relation's rows as they are. A KeyError says that none is defined.
    """
    if relation in TABLES:
        return {column.name: column for column in view_columns(relation)}[name]
    for columns in (VIEW_DOCS.get(relation, ()), COLUMNS.values(), METRICS):
        for column in columns:
            if column.name == name:
                return column
    return column_of(_PASSED[relation], name)
