"use strict";
(() => {
  document.documentElement.classList.add("js");

  // Tables sort by the cells' data-sort; cells without one stay last either way.
  const key = (row, column) => row.cells[column].dataset.sort;
  const compare = (a, b) => {
    const difference = Number(a) - Number(b);
    return Number.isNaN(difference) ? a.localeCompare(b) : difference;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const order = heading.getAttribute("aria-sort");
        const first = heading.dataset.first === "desc" ? "descending" : "ascending";
        const other = first === "descending" ? "ascending" : "descending";
        const next = order === first ? other : first;
        headings.forEach((each) => each.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", next);
        const sign = next === "descending" ? -1 : 1;
        const rows = [...table.tBodies[0].rows].sort((left, right) => {
          const a = key(left, column);
          const b = key(right, column);
          if (a === undefined || b === undefined) {
            return Number(a === undefined) - Number(b === undefined);
          }
          return sign * compare(a, b);
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // Labels of points go where they overlap nothing; those that find no place stay on hover.
  const anchors = [
    ["end", -8, -6], ["start", 8, -6], ["end", -9, 4], ["start", 9, 4],
    ["start", 8, 15], ["end", -8, 15], ["middle", 0, -10], ["middle", 0, 20],
  ];
  const overlap = (a, b) =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const placeLabels = (figure) => {
    const area = figure.querySelector(".area").getBoundingClientRect();
    if (!area.width) return;
    const drawn = figure.querySelectorAll("use, line.frontier");
    const taken = [...drawn].map((mark) => mark.getBoundingClientRect());
    const labels = [...figure.querySelectorAll("text.label")];
    labels.sort((a, b) => a.dataset.rank - b.dataset.rank);
    for (const label of labels) {
      label.classList.add("placed");
      const found = anchors.some(([anchor, dx, dy]) => {
        label.setAttribute("text-anchor", anchor);
        label.setAttribute("dx", dx);
        label.setAttribute("dy", dy);
        const box = label.getBoundingClientRect();
        const inside = box.left >= area.left - 2 && box.right <= area.right + 2 &&
          box.top >= area.top && box.bottom <= area.bottom;
        if (!inside || taken.some((other) => overlap(box, other))) return false;
        taken.push(box);
        return true;
      });
      label.classList.toggle("placed", found);
    }
  };
  const scatters = [...document.querySelectorAll("figure.scatter")];
  const placeAll = () => scatters.forEach(placeLabels);

  const choice = document.getElementById("cost-choice");
  const showCost = () => {
    for (const figure of scatters) {
      figure.hidden = choice !== null && figure.dataset.cost !== choice.value;
    }
    placeAll();
  };
  if (choice) choice.addEventListener("change", showCost);
  showCost();
  addEventListener("resize", placeAll);

  // Paper cannot be clicked: unfold everything for printing, then fold it again.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((details) => { details.open = true; });
    placeAll();
  });
  addEventListener("afterprint", () => folded.forEach((details) => { details.open = false; }));
})();
