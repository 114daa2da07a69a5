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
  function shown(x) {
    const size = Math.abs(x);
    const digits = size >= 100 ? 0 : size >= 10 ? 1 : 2;
    return x.toFixed(digits).replace(/^-(0(\.0+)?)$/, "$1").replace("-", "−");
  }
  const listed = (names) => (names.length > 5 ? `${names.length} of them` : names.join(", "));

  // ---- the first screen

  function head() {
    const { treated, baseline, families, tasks, variants, counts } = page;
    const title = treated.length
      ? `${treated.length > 3 ? `${treated.length} variants` : treated.join(", ")} against ${baseline}`
      : variants.length ? `${listed(families)}: ${listed(variants)}` : "Nothing to measure yet";
    at("title").textContent = title;
    document.title = `${title} · Canopy report`;
    const of = (n, one) => `${whole(n)} ${one}${n === 1 ? "" : "s"}`;
    at("compared").textContent = variants.length
      ? `${families.length > 1 ? "Families" : "Family"} ${listed(families)}, on ${listed(tasks)}: ` +
        `${of(counts.rollouts, "rollout")} and ${of(counts.tokens, "token")} ` +
        `from ${of(counts.prompts, "prompt")}, by ${of(counts.models, "model")}.`
      : "The store has no complete run.";
    if (page.notes.length) {
      at("notes").hidden = false;
      at("notes").append(...page.notes.map((note) => make("li", {}, note)));
    }
    const { confidence, replicates, seed } = page.bootstrap;
    const level = `${+(100 * confidence).toFixed(6)}%`;
    at("pooled").textContent = !page.figures.length ? ""
      : treated.length
        ? `Pooled over ${families.length > 1 ? "families and " : ""}tasks, over the prompts that ${baseline} ` +
          `and the other variant share, as canopy compare pools them; in brackets the ${level} interval of the change.`
        : `Pooled over ${families.length > 1 ? "families and " : ""}tasks; in brackets the ${level} interval.`;
    at("made").textContent = `Made by canopy_store ${page.version}. Selection of rollouts: ${page.selection}. ` +
      `Embedder: ${page.embedder ?? "none"}. Intervals: ${level}, percentile bootstrap over prompts, ` +
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
      const card = make("div", { class: "figure" }, make("dt", {}, figure.name));
      for (const row of figure.rows.slice(0, 4)) {
        const compared = row.treated !== undefined;
        const value = make("div", { class: "value" }, shown(compared ? row.treated : row.value));
        if (figure.unit) value.append(make("span", { class: "unit" }, figure.unit));
        const from = make("div", { class: "from" });
        if (compared) {
          const who = page.treated.length > 1 ? `${row.variant}: ` : "";
          from.append(`${who}from ${shown(row.baseline)} · `, ...change(row));
        } else from.append(row.variant, ...between(row.value_ci_low, row.value_ci_high, shown));
        card.append(make("dd", {}, value, from));
      }
      at("figures").append(card);
    }
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
        const name = [columns[i].number ? "number" : "", value === false ? "no" : ""].join(" ").trim();
        const td = make("td", name ? { class: name } : {}, cell(value));
        if (typeof value === "string" && value.length > 24) td.title = value;
        return td;
      }))));
    };
    const heads = columns.map((column, i) => {
      const button = make("button", { type: "button" }, column.name);
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
      const section = make("section", { class: "wide", id: one.id, "aria-labelledby": id },
        make("h2", { id }, one.title), make("p", { class: "how" }, one.how));
      section.append(one.rows.length ? table(one.title, one.columns, one.rows)
        : make("p", { class: "missing" }, "Nothing to list."));
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
      const names = Object.keys(rows[0] ?? {}).filter((name) => !["order", "kind", "place"].includes(name));
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
    const entries = [...page.charts, { id: "explorer", short: "Rollouts" }, ...page.tables];
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
    spec.config.legend.columns = width < 520 ? 2 : 6;
    spec.config.axis.labelLimit = width < 520 ? 96 : 150;
    spec.description = `${chart.title}. ${chart.how}`;
    const { inner, columns } = sized(spec, width);
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

  const { prompts, models, rollouts, of } = page.explorer;
  let falling = false;

  // Token texts are not stored. Words, numbers and signs, each with the space before it, are the best
  // guess; where steps are more the longest piece is halved, where they are fewer the two neighbours
  // that are shortest together are joined.
  function pieces(text, count) {
    if (text === null) return null;
    const parts = text.match(/ ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu) ?? [];
    while (parts.length < count) {
      let longest = 0;
      parts.forEach((part, i) => { if (part.length > parts[longest].length) longest = i; });
      const letters = Array.from(parts[longest] ?? "");
      if (letters.length < 2) { parts.push(""); continue; } // fewer letters than steps
      const half = Math.ceil(letters.length / 2);
      parts.splice(longest, 1, letters.slice(0, half).join(""), letters.slice(half).join(""));
    }
    while (parts.length > count) {
      let best = 0;
      for (let i = 1; i < parts.length - 1; i += 1) {
        if (parts[i].length + parts[i + 1].length < parts[best].length + parts[best + 1].length) best = i;
      }
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
    return parts;
  }

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
    const values = rollout[colour] ?? rollout.entropy;
    const ended = rollout.end === "stop";
    const parts = pieces(rollout.text, Math.max(1, values.length - (ended ? 1 : 0)));
    const text = make("div", {
      class: "steps", tabindex: "0", role: "group",
      "aria-label": `Rollout ${rollout.sample}: arrow keys go through its steps`,
    });
    values.forEach((value, i) => {
      const last = ended && i === values.length - 1;
      const span = make("span", {}, last && parts ? "end" : parts?.[i] ?? "");
      if (last && parts) span.className = "end";
      else if (!parts) span.className = "blank";
      const share = Math.min(1, value / tops[colour]);
      span.style.backgroundColor = `color-mix(in srgb, var(--step) ${(60 * share).toFixed(1)}%, transparent)`;
      span.dataset.step = i;
      text.append(span);
    });
    let here = -1;
    const go = (i) => {
      if (i < 0 || i >= text.children.length) return;
      text.children[here]?.classList.remove("here");
      here = i;
      text.children[i].classList.add("here");
      at("readout").textContent = stepText(rollout, i);
    };
    text.addEventListener("mouseover", (event) => {
      if (!event.target.dataset.step) return;
      go(Number(event.target.dataset.step));
      event.target.title = stepText(rollout, here);
    });
    text.addEventListener("click", (event) => {
      if (event.target.dataset.step) go(Number(event.target.dataset.step));
    });
    text.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (way) { go(here + way); event.preventDefault(); }
    });
    const facts = [
      `sample ${rollout.sample}`, `${rollout.n} tokens`, `${rollout.rate.toFixed(3)} nats per token`,
      rollout.distance === null ? "" : `semantic distance ${rollout.distance.toFixed(3)}`,
      rollout.end === "length" ? "cut at the longest length" : "",
    ].filter(Boolean).join(" · ");
    const card = make("article", { class: "rollout" }, make("p", {}, facts));
    if (rollout.text === null) card.append(make("p", {}, "No text is stored: each box is one step."));
    card.append(text);
    return card;
  }

  function modelName(model) {
    return page.families.length > 1 ? `${model.family} ${model.variant}` : model.variant;
  }

  // families in order, and in each the baseline first
  const places = new Map(models.map((m) =>
    [modelName(m), page.families.indexOf(m.family) * 1000 + page.variants.indexOf(m.variant)]));
  const inOrder = (a, b) => places.get(a) - places.get(b);

  function fillModels() {
    const task = prompts[at("pick-prompt").value].task;
    const before = at("pick-model").value;
    const names = [...new Set(models.filter((m) => m.task === task).map(modelName))].sort(inOrder);
    const options = names.map((name) => make("option", { value: `=${name}` }, name));
    if (names.length > 1) options.unshift(make("option", { value: "" }, "all, side by side"));
    at("pick-model").replaceChildren(...options);
    if (options.some((option) => option.value === before)) at("pick-model").value = before;
  }

  function explore() {
    const place = Number(at("pick-prompt").value);
    const colour = at("pick-colour").value;
    const key = at("pick-sort").value;
    const wanted = at("pick-model").value;
    at("prompt").textContent = prompts[place].text;
    at("readout").textContent = "Point at a step, or tab to a rollout and use the arrow keys.";
    at("explorer-body").dataset.colour = colour;
    at("scale-end").textContent = `${(tops[colour] / 100).toFixed(1)} nats or more, ${at("pick-colour").selectedOptions[0].text}`;
    const groups = new Map();
    for (const rollout of rollouts) {
      const name = modelName(models[rollout.m]);
      if (rollout.p !== place || (wanted && wanted !== `=${name}`)) continue;
      groups.set(name, [...(groups.get(name) ?? []), rollout]);
    }
    const order = [...groups].sort(([a], [b]) => inOrder(a, b));
    at("rollouts").replaceChildren(...order.map(([name, members]) => {
      members.sort((a, b) => (falling ? -1 : 1) * ((a[key] ?? 0) - (b[key] ?? 0)) || a.sample - b.sample);
      return make("section", { "aria-label": name }, make("h3", {}, name),
        ...members.map((rollout) => rolloutCard(rollout, colour)));
    }));
  }

  function explorer() {
    at("explorer-how").textContent = "A stronger colour means more nats: a step's entropy is how open the choice was, " +
      "its surprisal how unlikely the chosen token was.";
    if (!rollouts.length) {
      at("explorer-body").replaceWith(make("p", { class: "missing" }, "No rollouts to read: no run is complete, or the report was made with --explorer-rollouts 0."));
      return;
    }
    const tasks = new Map();
    prompts.forEach((prompt, i) => {
      const label = prompt.text.trim().replace(/\s+/g, " ");
      const option = make("option", { value: i }, label.length > 70 ? `${label.slice(0, 70)}…` : label);
      tasks.set(prompt.task, [...(tasks.get(prompt.task) ?? []), option]);
    });
    for (const [task, options] of tasks) {
      at("pick-prompt").append(make("optgroup", { label: task }, ...options));
    }
    if (!rollouts.some((r) => r.surprisal)) at("pick-colour").options[1].disabled = true;
    if (!rollouts.some((r) => r.distance !== null)) at("pick-sort").options[2].disabled = true;
    const texts = rollouts.some((r) => r.text !== null);
    at("explorer-shown").textContent =
      `${whole(rollouts.length)} of ${whole(of)} rollouts are on this page. ` + (texts ? "The store keeps no token " +
      "texts: steps are laid over the text by word, split or joined until the number fits, so a colour may " +
      "stand a little beside its token." : "");
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
