const input = document.querySelector("input"), shown = document.querySelector("img");
const verdict = document.querySelector("#verdict"), body = document.querySelector("tbody");
const told = (value, digits) => value === null ? "no number" : value.toPrecision(digits);
async function score(file) {
  if (!file) return;
  URL.revokeObjectURL(shown.src);
  shown.src = URL.createObjectURL(file);
  verdict.textContent = "…";
  body.replaceChildren();
  const answer = await fetch("/score", {method: "POST", body: file}).catch(error => error);
  const said = answer instanceof Error ? {error: String(answer)} : await answer.json();
  if (said.error) { verdict.textContent = said.error; return; }
  const sure = said.probability === null ? "" : `, ${(100 * said.probability).toFixed(1)} %`;
  verdict.textContent = `${said.class}${sure}`;
  for (const each of said.detectors) {
    const row = body.insertRow();
    for (const text of [each.name, told(each.score, 5), told(each.threshold, 5)])
      row.insertCell().textContent = text;
    const cell = row.insertCell();
    cell.textContent = each.is_ood ? "out-of-distribution" : "in-distribution";
    cell.className = each.is_ood ? "worse" : "best";
  }
}
input.addEventListener("change", () => score(input.files[0]));
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => { event.preventDefault(); score(event.dataTransfer.files[0]); });
document.addEventListener("paste", event => score(event.clipboardData.files[0]));
