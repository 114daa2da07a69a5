-- grain: one row per run, embedder, and split of a corpus that a checkpoint of its lineage has read
-- keys: run_id, embedder, corpus, split
-- source: docs/measures.md, 'Collapse'
with recursive trained as (
    -- who wrote the text that a checkpoint was trained on: as its data set says, else its parent
    select m.model_id,
        case when d.data_sha256 is null then m.generation
            else coalesce(d.generation, case when d.generator is null then 0 else m.generation end)
        end as generation,
        case when d.data_sha256 is null or d.generation > 0 then coalesce(d.generator, m.parent_id)
            else d.generator
        end as writer_id
    from models m
    left join datasets d using (data_sha256)
),
lineage as (
    select model_id, generation, model_id as ancestor_id, generation as ancestor_generation,
        0 as distance
    from trained
    union
    select l.model_id, l.generation, t.model_id, t.generation, l.distance + 1
    from lineage l
    join trained c on c.model_id = l.ancestor_id
    join trained t on t.model_id = c.writer_id
    -- generation 0 ends it, and so does a lineage that bites its tail
    where l.ancestor_generation > 0 and l.distance < 1000
),
origin as (
    select model_id, generation,
        any_value(ancestor_id) filter (where ancestor_generation = 0) as origin_id
    from lineage
    group by all
),
member as (
    select *, coalesce(origin_id, model_id) as lineage_id from origin
),
scorer as (
    -- one of a checkpoint: the plain one with the name that it gets by itself, else the first by name
    select c.model_id, s.corpus, c.scorer_id, c.template
    from scorers c
    join (select distinct scorer_id, corpus from document_scores) s using (scorer_id)
    where c.context_sha256 is null and c.number_format is null
    qualify row_number() over (
        partition by c.model_id, s.corpus
        order by c.scorer_id <> c.family || '.' || c.variant, c.scorer_id
    ) = 1
),
token as (
    select c.model_id, s.corpus, d.split,
        unnest(list_slice(s.tokens, len(s.tokens) - s.n_tokens + 1, len(s.tokens))) as token,
        unnest(s.logprob)::double as logprob
    from document_scores s
    join scorer c using (scorer_id, corpus)
    join documents d using (corpus, document_id)
    where s.tokens is not null
),
counted as (
    select model_id, corpus, token, count(*) as occurrences
    from token
    group by all
),
tail as (
    -- the rarest, those that are equally rare together, until a tenth of the tokens is reached
    select model_id, corpus, token
    from counted
    qualify coalesce(sum(occurrences) over (
        partition by model_id, corpus order by occurrences
        range between unbounded preceding and current row exclude group
    ), 0) < 0.1 * sum(occurrences) over (partition by model_id, corpus)
),
tail_of_split as (
    select model_id, corpus, split, count(*) as n_tail_tokens, avg(-logprob) as tail_nll
    from token
    semi join tail using (model_id, corpus, token)
    group by all
),
read as (
    select m.lineage_id, c.model_id, c.corpus, p.split, c.scorer_id, c.template, p.n_tokens, p.nll,
        case when whole.tokens_known then coalesce(t.n_tail_tokens, 0) end as n_tail_tokens,
        case when whole.tokens_known then t.tail_nll end as tail_nll
    from scorer c
    join member m using (model_id)
    join perplexity p using (scorer_id, corpus)
    join (
        select scorer_id, corpus, count(tokens) = count(*) as tokens_known
        from document_scores
        group by all
    ) whole using (scorer_id, corpus)
    left join tail_of_split t using (model_id, corpus, split)
),
place as (
    select distinct lineage_id, corpus, split from read
),
generated as (
    select r.run_id, r.model_id, r.temperature, m.generation, m.origin_id, m.lineage_id,
        same_policy('{"temperature": 1, "top_k": 0, "top_p": 1}', r.temperature, r.top_k, r.top_p,
            r.min_p, r.typical_p, r.repetition_penalty)
            and r.model_id = m.origin_id as own
    from runs r
    join member m using (model_id)
),
pair as (
    select distinct g.run_id, p.corpus
    from generated g
    join place p using (lineage_id)
),
run_bigram as (
    select run_id, bigram, count(*) as occurrences
    from (select run_id, unnest(bigrams(text)) as bigram from rollouts semi join pair using (run_id))
    group by all
),
corpus_bigram as (
    select corpus, bigram, count(*) as occurrences
    from (select corpus, unnest(bigrams(text)) as bigram from documents semi join pair using (corpus))
    group by all
),
overlap as (
    select p.run_id, p.corpus,
        sum(r.occurrences) as seen,
        count(*) filter (where c.occurrences <= 2) as rare
    from pair p
    join run_bigram r using (run_id)
    join corpus_bigram c using (corpus, bigram)
    group by all
),
of_run as (
    select run_id, count(text) = count(*) as texts_known from rollouts group by all
),
of_corpus as (
    select corpus, count(text) = count(*) as texts_known from documents group by all
),
bigram_share as (
    select p.run_id, p.corpus,
        coalesce(o.rare, 0) / nullif(c.rare, 0) as rare_kept,
        1 - coalesce(o.seen, 0) / r.occurrences as unseen
    from pair p
    join of_run s on s.run_id = p.run_id and s.texts_known
    join of_corpus d on d.corpus = p.corpus and d.texts_known
    left join overlap o on o.run_id = p.run_id and o.corpus = p.corpus
    left join (select run_id, sum(occurrences) as occurrences from run_bigram group by all) r
        on r.run_id = p.run_id
    left join (
        select corpus, count(*) filter (where occurrences <= 2) as rare from corpus_bigram group by all
    ) c on c.corpus = p.corpus
),
under_origin as (
    select g.run_id, any_value(k.n_rollouts) as n_rollouts, any_value(k.cross_entropy) as cross_entropy
    from generated g
    join kl_divergence k on k.run_id = g.run_id and k.scorer_id = g.origin_id
    where k.selection = 'all' and k.n_outside = 0 and same_policy(k.policy, 1, 0, 1)
    group by all
)
select v.family, v.variant, g.model_id, g.generation, g.origin_id, w.writer_id, v.task, v.run_id, g.temperature,
    v.embedder, p.corpus, p.split,
    s.scorer_id,
    s.nll,
    case when s.template is not distinct from o.template and s.n_tokens = o.n_tokens
        then difference(s.nll, o.nll) end as nll_rise,
    s.n_tail_tokens,
    s.tail_nll,
    case when s.template is not distinct from o.template and s.n_tokens = o.n_tokens
            and s.n_tail_tokens = o.n_tail_tokens
        then difference(s.tail_nll, o.tail_nll) end as tail_nll_rise,
    b.rare_kept,
    b.unseen,
    -- its own model's surprisal where generation 0 wrote it, under the whole distribution
    exp(coalesce(
        case when u.n_rollouts = v.n_rollouts then u.cross_entropy end,
        case when g.own then v.surprisal_mean end
    ) / v.mean_length) as origin_ppl,
    v.ce_star, v.mean_length, v.entropy_rate, v.rho_pearson, v.semantic_diversity, v.vendi_score,
    v.diversity_number
from model_metrics v
join generated g using (run_id)
join (select model_id, writer_id from trained) w on w.model_id = g.model_id
join place p using (lineage_id)
left join read s on s.model_id = g.model_id and s.corpus = p.corpus and s.split = p.split
left join read o on o.model_id = g.origin_id and o.corpus = p.corpus and o.split = p.split
left join bigram_share b on b.run_id = v.run_id and b.corpus = p.corpus
left join under_origin u on u.run_id = v.run_id
where v.selection = 'all'
