"use strict";
// Text out of the store may come from strangers: it reaches the page through textContent alone.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children.map((c) => (c instanceof Node ? c : document.createTextNode(String(c)))));
    return node;
  }

  const whole = (x) => x.toLocaleString("en");
  const of = (n, one) => `${whole(n)} ${one}${n === 1 ? "" : "s"}`;
  function shown(x) {
    const size = Math.abs(x);
    const digits = size >= 100 ? 0 : size >= 10 ? 1 : 2;
    return x.toFixed(digits).replace(/^-(0(\.0+)?)$/, "$1").replace("-", "−");
  }
  const listed = (names) => (names.length > 5 ? `${names.length} of them` : names.join(", "));

  // the colour that a variant has in every chart, light and dark
  function dot(variant) {
    const { light, dark } = page.themes;
    const colour = (theme) => {
      const range = theme.range.category;
      return range[Math.max(0, page.variants.indexOf(variant)) % range.length];
    };
    const node = make("i", { class: "dot", "aria-hidden": "true" });
    node.style.backgroundColor = `light-dark(${colour(light)}, ${colour(dark)})`;
    return node;
  }

  // ---- the first screen

  function head() {
    const { treated, baseline, families, tasks, variants, counts } = page;
    const title = treated.length
      ? `${treated.length > 3 ? `${treated.length} variants` : treated.join(", ")} against ${baseline}`
      : variants.length ? `${listed(families)}: ${listed(variants)}` : "Nothing to measure yet";
    at("title").textContent = title;
    document.title = `${title} · Canopy report`;
    at("headline").textContent = page.headline;
    at("compared").textContent = counts.models
      ? `${families.length > 1 ? "Families" : "Family"} ${listed(families)}, on ${listed(tasks)}: ` +
        `${of(counts.rollouts, "rollout")} and ${of(counts.tokens, "token")} ` +
        `from ${of(counts.prompts, "prompt")}, by ${of(counts.models, "model")}.`
      : page.rollouts ? "The store has no complete run." : `${families.length > 1 ? "Families" : "Family"} ${listed(families)}.`;
    const scored = Object.entries(page.study).map(([name, n]) => of(n, name.replace(/s$/, "")));
    if (scored.length) at("compared").append(` Scored: ${scored.join(" and ")}.`);
    if (page.notes.length) {
      at("notes").hidden = false;
      at("notes").append(...page.notes.map((note) => make("li", {}, note)));
    }
    const { confidence, replicates, seed } = page.bootstrap;
    const level = `${+(100 * confidence).toFixed(6)}%`;
    at("pooled").textContent = !page.figures.length ? ""
      : treated.length
        ? `Pooled over ${families.length > 1 ? "families and " : ""}tasks, over the prompts that ${baseline} ` +
          `and the other variant share, as canopy compare pools them; in brackets the ${level} interval.`
        : `Pooled over ${families.length > 1 ? "families and " : ""}tasks; in brackets the ${level} interval.`;
    at("pooled").append(...page.fine_print.map((line) => ` ${line}`));
    at("made").textContent = `Made by canopy_store ${page.version}. ` +
      (page.rollouts ? `Selection of rollouts: ${page.selection}. Embedder: ${page.embedder ?? "none"}. ` : "") +
      `Intervals: ${level}, by Student's t with the standard error of a bootstrap over ${page.rollouts ? "prompts" : "clusters"}, ` +
      `${whole(replicates)} replicates, seed ${seed}.`;
  }

  const between = (low, high, text) => (low === null ? []
    : [" ", make("span", { class: "interval" }, `(${text(low)} to ${text(high)})`)]);

  // a measure that passes through zero, like ρ, has no percentage
  function change(row) {
    const part = row.percent_delta === null ? "delta" : "percent_delta";
    const text = (x) => {
      const number = part === "delta" ? x.toFixed(2) : x.toFixed(1);
      const bare = number.replace(/^-(0(\.0+)?)$/, "$1"); // no minus before a zero
      return `${x > 0 ? "+" : ""}${bare.replace("-", "−")}${part === "delta" ? "" : "%"}`;
    };
    return [text(row[part]), ...between(row[`${part}_ci_low`], row[`${part}_ci_high`], text)];
  }

  function keyFigures() {
    for (const figure of page.figures) {
      const rows = figure.rows.slice(0, 6).map((row) => keyFigure(figure, row));
      if (figure.rows.length > rows.length) {
        rows.push(make("dd", { class: "who" }, `and ${figure.rows.length - rows.length} more, in the charts below`));
      }
      const wide = figure.rows.some((row) => row.answers) ? "figure first-figure" : "figure";
      at("figures").append(make("div", { class: wide }, make("dt", {}, figure.name),
        make("div", { class: "rows" }, ...rows)));
    }
  }

  // rollouts a prompt, of both sides where they differ
  function samples({ baseline_n_samples: base, treated_n_samples: own }) {
    if (!base || !own) return "";
    return base === own ? ` × ${of(own, "rollout")}` : ` × ${base} and ${own} rollouts`;
  }

  function keyFigure(figure, row) {
    const compared = row.treated !== undefined;
    const value = make("div", { class: "value" });
    if (compared) value.append(make("span", { class: "before" }, `${shown(row.baseline)} →`), " ");
    value.append(make("strong", {}, shown(compared ? row.treated : row.value)));
    if (figure.unit) value.append(" ", make("span", { class: "unit" }, figure.unit));
    const told = make("div", {},
      make("div", { class: "who" }, dot(row.variant), make("bdi", {}, row.variant), ` · ${of(row.n_prompts, "prompt")}${samples(row)}`), value);
    if (compared) {
      told.append(make("div", { class: "change" }, ...change(row)), make("div", { class: "verdict" }, row.verdict));
      row.marks.forEach((mark) => told.append(make("div", { class: "marked" }, mark)));
    } else {
      told.append(make("div", { class: "change" }, ...between(row.value_ci_low, row.value_ci_high, shown)));
    }
    const entry = make("dd", {}, told);
    if (row.answers) {
      entry.append(make("div", { class: "answers" }, make("p", {}, "How much is that?"),
        make("ul", {}, ...row.answers.map((one) => make("li", {}, one)))));
    }
    return entry;
  }

  // ---- tables

  function cell(value) {
    if (value === null) return "–";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value)) return whole(value);
    return (Math.abs(value) >= 1000 || Math.abs(value) < 1e-3
      ? value.toPrecision(3) : value.toFixed(Math.abs(value) >= 100 ? 1 : 3)).replace("-", "−");
  }

  // a long name breaks after a sign, where it must
  const breakable = (name) =>
    name.split(/(?<=[._-])/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));

  function table(label, columns, rows) {
    const body = make("tbody");
    let sorted = { column: -1, down: false };
    const fill = () => {
      const order = [...rows];
      const { column, down } = sorted;
      if (column >= 0) {
        order.sort((a, b) => {
          const [x, y] = [a[column], b[column]];
          if (x === null || y === null) return (x === null) - (y === null); // nothing goes last
          const way = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
          return down ? -way : way;
        });
      }
      body.replaceChildren(...order.map((row) => make("tr", {}, ...row.map((value, i) => {
        const marked = value === false || (columns[i].above !== undefined && value > columns[i].above)
          || (columns[i].below !== undefined && value !== null && value < columns[i].below);
        const name = [columns[i].number ? "number" : "", marked ? "no" : ""].join(" ").trim();
        const td = i ? make("td", name ? { class: name } : {}, cell(value))
          : make("th", { scope: "row" }, make("span", {}, ...breakable(cell(value))));
        if (typeof value === "string" && value.length > 24) td.title = value;
        return td;
      }))));
    };
    const heads = columns.map((column, i) => {
      const button = make("button", { type: "button" }, ...breakable(column.name));
      const th = make("th", { scope: "col", "aria-sort": "none" }, button);
      if (column.doc) th.title = column.doc;
      if (column.number) th.className = "number";
      button.addEventListener("click", () => {
        sorted = { column: i, down: sorted.column === i ? !sorted.down : false };
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        th.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
        fill();
      });
      return th;
    });
    fill();
    const whole = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, whole);
  }

  function tables() {
    for (const one of page.tables) {
      const id = `${one.id}-title`;
      const section = make("section", { class: "wide tables", id: one.id, "aria-labelledby": id },
        make("h2", { id }, one.title), make("p", { class: "how" }, one.how));
      section.append(one.rows.length ? table(one.title, one.columns, one.rows)
        : make("p", { class: "missing" }, one.missing));
      if (one.rows.length && one.shown) section.append(make("p", { class: "small" }, one.shown));
      at("tables").append(section);
    }
  }

  // ---- charts

  const drawings = [];

  function rowsOf(spec) {
    return spec.datasets.rows;
  }

  function numbers(chart) {
    const details = make("details", {}, make("summary", {}, "Show the numbers"));
    details.addEventListener("toggle", () => {
      if (details.childElementCount > 1) return;
      const rows = rowsOf(chart.spec).slice(0, 1000);
      const names = Object.keys(rows[0] ?? {})
        .filter((name) => !["order", "kind", "place", "number", "end", "start", "cut", "last"].includes(name));
      const columns = names.map((name) => ({ name, number: typeof rows[0][name] === "number" }));
      details.append(table(`${chart.title}: numbers`, columns,
        rows.map((row) => names.map((name) => row[name] ?? null))));
    });
    return details;
  }

  function charts() {
    for (const chart of page.charts) {
      const id = `${chart.id}-title`;
      const figure = make("figure", { class: "chart", id: chart.id, "aria-labelledby": id },
        make("h2", { id }, chart.title), make("p", { class: "how" }, chart.how));
      if (chart.missing) figure.append(make("p", { class: "missing" }, chart.missing));
      else {
        const box = make("div", { class: "drawing", role: "group", "aria-label": chart.title });
        figure.append(box);
        if (chart.shown) figure.append(make("p", { class: "small" }, chart.shown));
        figure.append(numbers(chart));
        drawings.push({ chart, box, width: 0, view: null });
      }
      at("charts").append(figure);
    }
    const entries = [...page.charts, ...(page.rollouts ? [{ id: "explorer", short: "Rollouts" }] : []), ...page.tables];
    at("contents").append(...entries.map((entry) =>
      make("li", {}, make("a", { href: `#${entry.id}` }, entry.short))));
  }

  // Columns and widths that fill the box; Vega-Lite itself can fit a single view but no facets.
  function sized(spec, width) {
    if (!spec.facet) return { inner: spec, columns: 1 };
    const field = spec.facet.field;
    const panels = new Set(rowsOf(spec).map((row) => row[field])).size;
    const least = field === "metric" ? 150 : 300;
    const most = Math.max(1, Math.min(panels, Math.floor((width - 40) / (least + 26))));
    const columns = Math.ceil(panels / Math.ceil(panels / most)); // rows of equal length, no orphan
    spec.columns = columns;
    return { inner: spec.spec, columns };
  }

  async function draw(drawing, theme) {
    const { chart, box } = drawing;
    const width = Math.floor(box.clientWidth);
    const spec = structuredClone(chart.spec);
    delete spec.title;
    spec.background = "transparent";
    spec.config = structuredClone(page.themes[theme]);
    const longest = Math.max(...page.variants.map((name) => name.length));
    spec.config.legend.columns = width >= 520 ? Math.max(1, Math.min(6, Math.floor(width / (longest * 7 + 40))))
      : longest > 14 ? 1 : 2;
    spec.config.legend.labelLimit = Math.min(width - 170, 420);
    if (width < 520) {
      for (const param of spec.params) param.value = param.name === "label_line" ? 16 : Math.floor((width - 110) / 8);
    }
    spec.description = `${chart.title}. ${chart.how}`;
    const { inner, columns } = sized(spec, width);
    // one below the other, each chart has its own axis: the last one's may be screens away
    if (spec.facet && columns === 1) spec.resolve = { ...spec.resolve, axis: { x: "independent" } };
    inner.width = Math.max(120, Math.floor((width - 50) / columns) - 46);
    for (let turn = 0; turn < 3; turn += 1) {
      drawing.view?.finalize();
      // ast: no eval, which the page's policy forbids; nothing in the charts needs a loader
      drawing.view = await window.vegaEmbed(box, spec, {
        mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false,
        tooltip: { theme: theme === "dark" ? "dark" : "light" },
      });
      const excess = box.querySelector("svg").getBoundingClientRect().width - width;
      if (excess <= 0 && excess > -8 * columns) break;
      const better = Math.max(120, Math.floor(inner.width - (excess + 1) / columns));
      if (better === inner.width) break;
      inner.width = better;
    }
    drawing.width = width;
    box.dataset.drawn = theme;
  }

  let queue = Promise.resolve();
  function drawAll(force) {
    const theme = document.documentElement.dataset.theme;
    for (const drawing of drawings) {
      queue = queue.then(() => {
        if (theme !== document.documentElement.dataset.theme) return null;
        if (!force && drawing.width === Math.floor(drawing.box.clientWidth)) return null;
        return draw(drawing, theme);
      }).catch((error) => {
        console.error(error);
        drawing.box.replaceChildren(make("p", { class: "missing" }, "This chart could not be drawn."));
      });
    }
    queue = queue.then(() => { document.body.dataset.ready = theme; });
  }

  // ---- light and dark

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    const other = theme === "dark" ? "light" : "dark";
    at("theme").textContent = other === "dark" ? "Dark" : "Light";
    at("theme").setAttribute("aria-label", `Switch to the ${other} theme`);
    drawAll(true);
  }

  // ---- the explorer

  const { prompts, models, rollouts, of: stored } = page.explorer;
  let falling = false;

  function ceiling(colour) {
    const values = rollouts.flatMap((r) => r[colour] ?? []).sort((a, b) => a - b);
    return Math.max(50, values[Math.floor(values.length * 0.97)] ?? 100);
  }
  const tops = { entropy: ceiling("entropy"), surprisal: ceiling("surprisal") };

  function stepText(rollout, i) {
    const part = (name) => (rollout[name] ? `${name} ${(rollout[name][i] / 100).toFixed(2)} nats` : "");
    return [`Step ${i + 1} of ${rollout.n}`, part("entropy"), part("surprisal")].filter(Boolean).join(", ");
  }

  function rolloutCard(rollout, colour) {
    const model = models[rollout.m];
    const values = rollout[colour] ?? rollout.entropy;
    const ended = rollout.end === "stop";
    // one list of tokens: on the text where each has its characters there, else boxes beneath it
    const placed = rollout.text && rollout.chars;
    const strip = make("div", {
      class: placed ? "text tokens" : "steps", tabindex: "0", role: "group",
      "aria-label": `Rollout ${rollout.sample} of ${modelName(model)}: arrow keys go through its tokens`,
    });
    if (placed) strip.setAttribute("dir", "auto");
    const characters = placed ? Array.from(rollout.text) : []; // as the store counts, not UTF-16 units
    let read = 0;
    values.forEach((value, i) => {
      const box = make("span");
      if (placed) {
        box.textContent = characters.slice(read, read + rollout.chars[i]).join("");
        read += rollout.chars[i];
        if (!rollout.chars[i]) box.className = "none"; // part of a character, or a token that is not shown
      }
      if (ended && i === values.length - 1) box.classList.add("end");
      const share = Math.min(1, value / tops[colour]);
      box.style.backgroundColor = `color-mix(in srgb, var(--nats) ${(6 + 94 * share).toFixed(1)}%, transparent)`;
      box.dataset.step = i;
      strip.append(box);
    });
    let here = -1;
    const go = (i) => {
      if (i < 0 || i >= strip.children.length) return;
      strip.children[here]?.classList.remove("here");
      here = i;
      strip.children[i].classList.add("here");
      at("readout").textContent = stepText(rollout, i);
    };
    strip.addEventListener("mouseover", (event) => {
      if (!event.target.dataset.step) return;
      go(Number(event.target.dataset.step));
      event.target.title = stepText(rollout, here);
    });
    strip.addEventListener("click", (event) => {
      if (event.target.dataset.step) go(Number(event.target.dataset.step));
    });
    strip.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (way) { go(here + way); event.preventDefault(); }
    });
    const facts = [
      `sample ${rollout.sample}`, of(rollout.n, "token"), `${rollout.rate.toFixed(3)} nats per token`,
      rollout.distance === null ? "" : `semantic distance ${rollout.distance.toFixed(3)}`,
      rollout.end === "length" ? "cut at the longest length" : "",
    ].filter(Boolean).join(" · ");
    const text = rollout.text === null
      ? make("p", { class: "lacking" }, "No text is stored.")
      : rollout.text === "" ? make("p", { class: "lacking" }, "The text is empty.")
        : make("div", { class: "text", dir: "auto" }, rollout.text);
    const unplaced = rollout.text ? [make("p", { class: "placed" }, `0 of ${of(rollout.n, "token")} placed on the text`)] : [];
    return make("article", { class: "rollout" },
      make("p", { class: "facts" }, dot(model.variant), make("strong", {}, make("bdi", {}, modelName(model))), ` · ${facts}`),
      ...(placed ? [strip] : [text, strip, ...unplaced]));
  }

  function modelName(model) {
    return page.families.length > 1 ? `${model.family} ${model.variant}` : model.variant;
  }

  // families in order, and in each the baseline first
  const rank = (m) => page.families.indexOf(m.family) * 1000 + page.variants.indexOf(m.variant);

  // What can stand in a row: each variant beside the baseline of its family, all, one alone.
  function rowChoices(task) {
    const present = models.map((model, i) => ({ ...model, i })).filter((m) => m.task === task)
      .sort((a, b) => rank(a) - rank(b));
    const choices = [];
    for (const base of present.filter((m) => m.variant === page.baseline)) {
      for (const child of present.filter((m) => m.family === base.family && m !== base)) {
        choices.push({ label: `${modelName(base)} and ${modelName(child)}`, of: [base, child] });
      }
    }
    if (present.length > 1 && (present.length > 2 || !choices.length)) choices.push({ label: "all", of: present });
    return [...choices, ...present.map((m) => ({ label: modelName(m), of: [m] }))];
  }

  let choices = [];
  function fillModels() {
    const before = at("pick-model").selectedOptions[0]?.textContent;
    choices = rowChoices(prompts[at("pick-prompt").value].task);
    at("pick-model").replaceChildren(...choices.map((choice, i) => make("option", { value: i }, choice.label)));
    at("pick-model").value = Math.max(0, choices.findIndex((choice) => choice.label === before));
  }

  function explore() {
    const place = Number(at("pick-prompt").value);
    const colour = at("pick-colour").value;
    const key = at("pick-sort").value;
    at("task").textContent = `Task: ${prompts[place].task}`;
    at("prompt").textContent = prompts[place].text;
    at("readout").textContent = "Point at a token, or tab to a rollout and use the arrow keys.";
    at("scale-end").textContent = `${(tops[colour] / 100).toFixed(1)} nats or more, ${at("pick-colour").selectedOptions[0].text}`;
    const shownModels = choices[at("pick-model").value].of;
    const columns = shownModels.map((model) => rollouts.filter((r) => r.p === place && r.m === model.i)
      .sort((a, b) => (falling ? -1 : 1) * ((a[key] ?? 0) - (b[key] ?? 0)) || a.sample - b.sample));
    const cells = shownModels.map((model) => make("h3", {}, dot(model.variant), make("bdi", {}, modelName(model))));
    const longest = Math.max(1, ...columns.map((column) => column.length));
    for (let i = 0; i < longest; i += 1) {
      columns.forEach((column, j) => {
        if (column[i]) cells.push(rolloutCard(column[i], colour));
        else {
          const why = column.length ? `${modelName(shownModels[j])} has no further rollout of this prompt here.`
            : `${modelName(shownModels[j])} has no rollout of this prompt.`;
          cells.push(make("p", { class: i && !column.length ? "empty" : "missing" }, i && !column.length ? "" : why));
        }
      });
    }
    at("rollouts").style.setProperty("--columns", shownModels.length);
    at("rollouts").replaceChildren(...cells);
  }

  function explorer() {
    at("explorer-how").textContent = "Each shaded piece is one token, in order; a stronger shade means more nats: " +
      "a step's entropy is how open the choice was, its surprisal how unlikely the chosen token was. A character that " +
      "several tokens spell stands at the last of them; the others, and tokens that show no text, are thin bars. Where " +
      "it is not stored what each token spells, its box stands in a strip beneath the text. Each row pairs rollouts " +
      "by their rank in the order chosen.";
    if (!page.rollouts) {
      at("explorer").remove();
      return;
    }
    if (!rollouts.length) {
      at("explorer-body").replaceWith(make("p", { class: "missing" }, "No rollouts to read: no run is complete, or the report was made with --explorer-rollouts 0."));
      return;
    }
    prompts.forEach((prompt, i) => {
      const label = `${prompt.task}: ${prompt.text.trim().replace(/\s+/g, " ")}`;
      at("pick-prompt").append(make("option", { value: i }, label.length > 80 ? `${label.slice(0, 80)}…` : label));
    });
    if (!rollouts.some((r) => r.surprisal)) at("pick-colour").options[1].disabled = true;
    if (!rollouts.some((r) => r.distance !== null)) at("pick-sort").options[2].disabled = true;
    at("explorer-shown").textContent = `${whole(rollouts.length)} of ${whole(stored)} rollouts are on this page.`;
    at("pick-prompt").addEventListener("change", () => { fillModels(); explore(); });
    for (const id of ["pick-model", "pick-colour", "pick-sort"]) at(id).addEventListener("change", explore);
    at("pick-order").addEventListener("click", () => {
      falling = !falling;
      at("pick-order").textContent = falling ? "Largest first" : "Smallest first";
      explore();
    });
    fillModels();
    explore();
  }

  // ---- all of it

  head();
  keyFigures();
  charts();
  tables();
  explorer();
  at("theme").addEventListener("click", () =>
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  let waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => drawAll(false), 150);
  });
})();
