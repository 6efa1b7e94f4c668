// Opens a report in Chromium and uses it as a person would; prints what it found as one line of JSON.
//   node report_page.mjs REPORT.html CHROMIUM PLAYWRIGHT-CORE [FOLDER-FOR-SCREENSHOTS]
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [report, executablePath, playwright, folder] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(playwright);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const itself = pathToFileURL(report).href;
const found = { errors: [], requests: [] };

async function openPage(width, height, colorScheme) {
  const page = await (await browser.newContext({ viewport: { width, height }, colorScheme })).newPage();
  page.on("console", (message) => message.type() === "error" && found.errors.push(message.text()));
  page.on("pageerror", (error) => found.errors.push(String(error)));
  page.on("dialog", (dialog) => { found.errors.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });
  page.on("request", (request) => request.url() !== itself && !request.url().startsWith("data:") && found.requests.push(request.url()));
  await page.goto(itself);
  await settle(page);
  return page;
}

// Until what the page draws has not changed for a while.
async function settle(page) {
  for (let before = null, now = ""; before !== now;) {
    before = now;
    await page.waitForTimeout(150);
    now = await page.evaluate(() => [...document.querySelectorAll("canvas")].map((canvas) => canvas.width).join());
  }
}

const shoot = (page, name, options = {}) => folder && page.screenshot({ path: `${folder}/${name}.png`, ...options });
const page = await openPage(1440, 900, "dark");
const labels = () => page.$$eval(".card", (cards) => cards.map((card) => card.title));
const drawn = () => page.$$eval(".card canvas", (all) => all.filter((canvas) => canvas.width > 0).length);
const pixels = () => page.$eval("#view", (canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.reduce((hash, value) => (Math.imul(hash, 31) + value) | 0, 7);
});
const isOpen = (id) => page.$eval(`#${id}`, (dialog) => dialog.open);

// The gallery: order, direction, filters, search, thumbnails.
found.text = await page.evaluate(() => document.body.innerText);
found.order = await labels();
found.thumbnailsAtFirst = await drawn();
await shoot(page, "gallery-dark");
found.sorted = {};
for (const by of await page.$$eval("#sort option", (options) => options.map((option) => option.value))) {
  await page.selectOption("#sort", by);
  const ascending = await labels();
  await page.click("#descending");
  found.sorted[by] = { ascending, descending: await labels() };
  await page.click("#descending");
}
await page.selectOption("#sort", "input order");
found.filtered = {};
for (const filter of await page.$$eval("#filter option", (options) => options.map((option) => option.value))) {
  await page.selectOption("#filter", filter);
  found.filtered[filter] = await labels();
}
await page.selectOption("#filter", "all");
await page.fill("#find", found.order.at(-1) ?? "");
found.searched = await labels();
await page.fill("#find", "");
await page.evaluate(() => { document.activeElement.blur(); scrollTo(0, document.body.scrollHeight); });
await settle(page);
found.thumbnailsAtTheEnd = await drawn();
found.lastIsDrawn = await page.$$eval(".card canvas", (all) => all.length === 0 || all.at(-1).width > 0);
// Which of these show a picture from a file: reading such a canvas is not allowed.
found.fromFiles = await page.$$eval(".card canvas", (all) => all.filter((canvas) => canvas.width > 0).map((canvas) => {
  try {
    canvas.getContext("2d").getImageData(0, 0, 1, 1);
    return [canvas.frame.label, false];
  } catch {
    return [canvas.frame.label, true];
  }
}));
await page.evaluate(() => scrollTo(0, 0));
await settle(page);

// The masks that the page makes of run lengths: how many pixels, and the sum of their places, column by column.
found.decoded = await page.evaluate(() => shapes.map((node) => read(node).masks.flat().map(decode).map((mask) =>
  mask.reduce(([count, places], inside, place) => [count + inside, places + inside * place], [0, 0]))));

// The player of a cine: the frame it begins with, another by the slider, and playing.
if (await page.isVisible(".player")) {
  const text = () => page.textContent(".player .dim"), mark = () => page.getAttribute(".cine .mark", "transform");
  const hash = () => page.$eval(".player canvas", (canvas) => canvas.toDataURL());
  const slide = (place) => page.$eval(".player input", (slider, to) => { slider.value = to; slider.oninput(); }, place);
  const frames = 1 + Number(await page.getAttribute(".player input", "max"));
  found.cine = { frames, first: await text(), charts: await page.$$eval(".cine svg", (all) => all.length) };
  const [before, picture] = [await mark(), await hash()];
  await slide(frames - 1);
  await settle(page);
  Object.assign(found.cine, { sought: await text(), movesTheMark: (await mark()) !== before, redrawn: (await hash()) !== picture });
  await page.click(".player button");
  await page.waitForFunction((last) => document.querySelector(".player .dim").textContent !== last, found.cine.sought);
  found.cine.plays = true;
  await page.click(".player button");
  await settle(page);
  const stopped = await text();
  await page.waitForTimeout(300);
  found.cine.pauses = (await text()) === stopped;
  await shoot(page, "cine-dark");
}

// One frame, by the keyboard alone: to the first, open it, each toggle and back, the next frame and back, close.
if (found.order.length) {
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("Enter");
  await settle(page);
  found.opened = await isOpen("detail");
  await shoot(page, "detail-dark");
  found.facts = await page.$eval("#detail", (detail) => detail.innerText);
  found.changed = {};
  if (await page.isVisible("#view")) {
    const first = await pixels();
    for (const [key, back] of Object.entries({ o: "o", c: "c", g: "g", e: "e", "]": "[", 1: "1" })) {
      await page.keyboard.press(key);
      await settle(page);
      found.changed[key] = (await pixels()) !== first;
      await shoot(page, { g: "detail-truth", e: "detail-errors" }[key] ?? "detail-other");
      await page.keyboard.press(back);
      await settle(page);
    }
    found.restored = (await pixels()) === first;
    await page.keyboard.press("s");
    await settle(page);
    found.sideBySide = await page.isVisible("#plain");
    await shoot(page, "detail-side-by-side");
    await page.keyboard.press("s");
  }
  found.walked = [];
  for (const key of ["j", "ArrowRight", "k", "ArrowLeft"]) {
    await page.keyboard.press(key);
    found.walked.push(await page.textContent("#name"));
  }
  await page.keyboard.press("Escape");
  found.closed = !(await isOpen("detail"));
  found.focused = await page.evaluate(() => document.activeElement.title);
}
// Another question, of which the filter leaves fewer frames than are listed now, or none.
found.asked = [];
const asked = await page.$$eval("#detail .asked option", (options) => options.length);
for (let question = asked - 1; question > 0; question--) {
  await page.selectOption("#filter", "no mask");
  const [before] = await page.$$(".card");
  if (!before) continue;
  await before.click();
  await page.selectOption("#detail .asked select", { index: question });
  await settle(page);
  found.asked.push([await isOpen("detail"), (await labels()).length]);
  await page.keyboard.press("Escape");
  await page.selectOption("main .asked select", { index: 0 });
  await page.selectOption("#filter", "all");
}
await page.keyboard.press("?");
found.help = await isOpen("help");
await shoot(page, "keys");
await page.keyboard.press("Escape");

// Other windows, for the eye; none may be wider than its window.
found.sideways = [];
for (const [width, height, scheme] of [[400, 800, "light"], [400, 800, "dark"], [1440, 900, "light"], [2560, 1300, "dark"]]) {
  const other = await openPage(width, height, scheme);
  const wide = () => other.$$eval("html, #detail", (nodes) => nodes.some((node) => node.scrollWidth > innerWidth));
  if (await wide()) found.sideways.push(`gallery ${width}`);
  await shoot(other, `gallery-${width}-${scheme}`);
  if (width === 400) await shoot(other, `gallery-${width}-${scheme}-whole`, { fullPage: true });
  if (!found.order.length) continue;
  await other.click(".card");
  await other.keyboard.press("e");
  await settle(other);
  if (await wide()) found.sideways.push(`detail ${width}`);
  await shoot(other, `detail-${width}-${scheme}`);
}
await browser.close();
console.log(JSON.stringify(found));
