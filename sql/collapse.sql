-- grain: one row per run, embedder, and corpus and split that the run's model has read as a scorer
-- keys: run_id, embedder, scorer_id, corpus, split
-- source: docs/measures.md, 'Collapse'
with recursive trained as (
    -- a model, and the model that wrote its data
    select m.model_id, d.generator as writer_id
    from models m
    join datasets d using (data_sha256)
    where d.method in ('rollouts', 'mixed') and d.generator is not null
),
line as (
    select model_id, model_id as first_id, 0 as generation from models
    union
    select l.model_id, t.writer_id, l.generation + 1
    from line l
    join trained t on t.model_id = l.first_id
    -- data that writes itself ends
    where l.generation < 1000
),
origin as (
    select model_id, arg_max(first_id, generation) as first_id, max(generation)::integer as generation
    from line
    group by model_id
),
plain as (
    select p.*, c.model_id, c.template
    from perplexity p
    join scorers c using (scorer_id)
    where c.context_sha256 is null and c.number_format is null
),
of_origin as (
    select model_id, template, corpus, split, arg_min(nll, scorer_id) as nll
    from plain
    group by all
),
wanted as (
    select distinct r.run_id, p.corpus, p.split
    from runs r
    join plain p using (model_id)
),
-- words, and pairs of words that follow each other
document_pair as (
    select corpus, split,
        unnest(list_transform(range(1, len(w)), lambda i: w[i] || ' ' || w[i + 1])) as pair
    from (
        select corpus, split, regexp_extract_all(lower(text), '\w+') as w
        from documents
    )
),
corpus_pair as (
    select corpus, split, pair, count(*) as times
    from document_pair
    group by all
),
known_texts as (
    select corpus, split, count(text) = count(*) as known from documents group by all
),
run_pair as (
    select run_id, pair, count(*) as times
    from (
        select run_id,
            unnest(list_transform(range(1, len(w)), lambda i: w[i] || ' ' || w[i + 1])) as pair
        from (select run_id, regexp_extract_all(lower(text), '\w+') as w from rollouts)
    )
    group by all
),
run_texts as (
    select run_id, count(text) = count(*) as known from rollouts group by all
),
rare as (
    select n.run_id, n.corpus, n.split,
        avg((r.pair is not null)::integer) as rare_pairs_kept
    from wanted n
    join corpus_pair c using (corpus, split)
    left join run_pair r on r.run_id = n.run_id and r.pair = c.pair
    where c.times <= 2
    group by all
),
unseen as (
    select n.run_id, n.corpus, n.split,
        sum(case when c.pair is null then r.times else 0 end) / sum(r.times) as unseen_pairs
    from wanted n
    join run_pair r using (run_id)
    left join corpus_pair c on c.corpus = n.corpus and c.split = n.split and c.pair = r.pair
    group by all
),
scored_token as (
    select s.scorer_id, s.corpus, d.split,
        unnest(list_zip(list_slice(s.tokens, len(s.tokens) - s.n_tokens + 1, len(s.tokens)), s.logprob))
            as pair
    from document_scores s
    join documents d using (corpus, document_id)
    where s.tokens is not null
),
token as (
    select scorer_id, corpus, split, pair[1] as token, -pair[2]::double as nll,
        count(*) over (partition by scorer_id, corpus, split, pair[1]) as times
    from scored_token
),
ranked as (
    select *,
        -- tokens as rare as this one or rarer, of all
        count(*) over (partition by scorer_id, corpus, split order by times)
            / count(*) over (partition by scorer_id, corpus, split) as share
    from token
),
tail as (
    select scorer_id, corpus, split, avg(nll) as tail_nll
    from ranked
    where share <= 0.1
    group by all
),
of_first as (
    select run_id, scorer_id,
        case when sum(n_outside) = 0 then avg(cross_entropy) end as cross_entropy
    from cross_entropy
    where selection = 'all' and same_policy
    group by all
)
select m.family, m.variant, m.task, m.run_id, m.embedder, p.scorer_id, p.corpus, p.split,
    o.generation,
    o.first_id as first_model_id,
    p.nll, p.nll_se,
    p.nll - q.nll as nll_rise,
    t.tail_nll,
    case when k.known and x.known then a.rare_pairs_kept end as rare_pairs_kept,
    case when k.known and x.known then u.unseen_pairs end as unseen_pairs,
    exp(e.cross_entropy / m.mean_length) as generated_perplexity,
    m.ce_star, m.entropy_rate, m.rho_pearson, m.mean_length, m.semantic_diversity
from model_metrics m
join runs r using (run_id)
join plain p on p.model_id = r.model_id
join origin o on o.model_id = r.model_id
left join of_origin q on q.model_id = o.first_id and q.template is not distinct from p.template
    and q.corpus = p.corpus and q.split = p.split
left join tail t on t.scorer_id = p.scorer_id and t.corpus = p.corpus and t.split = p.split
left join known_texts k on k.corpus = p.corpus and k.split = p.split
left join run_texts x on x.run_id = m.run_id
left join rare a on a.run_id = m.run_id and a.corpus = p.corpus and a.split = p.split
left join unseen u on u.run_id = m.run_id and u.corpus = p.corpus and u.split = p.split
left join of_first e on e.run_id = m.run_id and e.scorer_id = o.first_id
where m.selection = 'all'
