// The live page's charts: a card for each that the server sends, drawn when it is near what is seen.
window.dash_clientside = window.dash_clientside || {};
window.dash_clientside.shoestring = (() => {
const cards = new Map();  // id: {card, title, subtitle, plot, figure, drawn}
let shown = null, wanted = "auto";

const near = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const item = cards.get(entry.target.dataset.key);
    if (item) { item.near = entry.isIntersecting; if (item.near) draw(item); }
  }
}, { rootMargin: "600px" });

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
function make(chart) {
  const card = element("section", "card"), title = element("h2"), subtitle = element("p", "sub"), plot = element("div", "plot"), box = element("div", "save");
  for (const kind of ["csv", "png"]) {
    const button = element("button", "", kind.toUpperCase());
    button.type = "button";
    Object.assign(button.dataset, { save: kind, file: chart.id });
    button.setAttribute("aria-label", `Save ${chart.title} as ${kind.toUpperCase()}`);
    box.append(button);
  }
  plot.id = chart.id;
  plot.setAttribute("role", "img");
  card.dataset.key = chart.id;
  card.append(title, subtitle, box, plot);
  const item = { card, title, subtitle, plot, near: false, drawn: null };
  cards.set(chart.id, item);
  near.observe(card);
  return item;
}
function draw(item) {
  if (!item.near) return;
  const mark = item.figure.version + document.documentElement.dataset.theme + Shoestring.prefersDark.matches + Shoestring.narrow.matches;
  if (item.drawn === mark) return;
  item.drawn = mark;
  const { data, layout } = Shoestring.finish(item.figure);
  layout.uirevision = item.figure.key;  // zooms stay
  Plotly.react(item.plot, data, layout, Shoestring.CONFIG);
}
function drawAll() {
  for (const item of cards.values()) draw(item);
}
function arrange(page) {
  const area = document.getElementById("charts");
  if (!area) return;
  const order = [];
  let section = "";
  for (const chart of page.charts) {
    if (chart.section !== section) {
      section = chart.section;
      const key = "section " + section, heading = cards.get(key) || { card: element("h2", "section", section), heading: true };
      cards.set(key, heading);
      order.push(heading.card);
    }
    const item = cards.get(chart.id) || make(chart);
    item.card.classList.toggle("wide", chart.wide);
    if (item.title.textContent !== chart.title) item.title.textContent = chart.title;
    if (item.subtitle.textContent !== chart.subtitle) item.subtitle.textContent = chart.subtitle;
    item.plot.setAttribute("aria-label", chart.title + ": " + chart.subtitle);
    if (item.plot.style.height !== chart.height + "px") { item.plot.style.height = chart.height + "px"; item.drawn = null; }
    item.figure = { data: chart.data, layout: chart.layout, version: page.version, key: page.key };
    order.push(item.card);
  }
  const keep = new Set(order);
  for (const [key, item] of cards) if (!keep.has(item.card)) {
    if (item.plot) { near.unobserve(item.card); Plotly.purge(item.plot); }
    item.card.remove();
    cards.delete(key);
  }
  order.forEach((card, i) => { if (area.children[i] !== card) area.insertBefore(card, area.children[i] || null); });
}
Shoestring.prefersDark.addEventListener("change", drawAll);
Shoestring.narrow.addEventListener("change", drawAll);

return {
  draw(page, theme) {
    if (theme !== wanted || !document.documentElement.dataset.theme) {
      wanted = theme || "auto";
      document.documentElement.dataset.theme = wanted;
    }
    if (page && page !== shown) { shown = page; arrange(page); }
    const begun = () => drawAll();
    requestAnimationFrame(begun);
    return page ? page.version : "";
  },
};
})();
