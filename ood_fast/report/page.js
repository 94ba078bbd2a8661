// Sorting by a column: its header becomes a button. Rows stay in their section; what is no number comes last. Numbers
// fall at the first click, names rise.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const text = (row, i) => row.cells[i].textContent;
  const number = (row, i) => parseFloat(text(row, i).replace("−", "-"));
  const bodies = [...table.tBodies].map(body => [body, [...body.rows].filter(row => row.className !== "section")]);
  headers.forEach((header, i) => {
    const numeric = i > 0 && bodies.some(([_, rows]) => rows.some(row => !isNaN(number(row, i))));
    const button = document.createElement("button");
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort") ?? (numeric ? "ascending" : "descending");
      const order = before === "ascending" ? "descending" : "ascending";
      headers.forEach(other => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      for (const [body, rows] of bodies) {
        body.append(...rows.sort((one, other) => {
          if (!numeric) return sign * text(one, i).localeCompare(text(other, i));
          const a = number(one, i), b = number(other, i);
          return isNaN(a) - isNaN(b) || sign * (a - b);
        }));
      }
    });
  });
}
