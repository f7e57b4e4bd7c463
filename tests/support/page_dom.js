// As much of a browser as a report's page needs. Usage: node page_dom.js PAGE.html; prints what was drawn, as JSON.
"use strict";
const fs = require("fs");
const vm = require("vm");
const html = fs.readFileSync(process.argv[2], "utf8");
const script = html.slice(html.lastIndexOf("<script>") + 8, html.lastIndexOf("</script>"));
const begin = html.indexOf('id="data">') + 10;
const everything = [];

class Node {
  constructor(tag) {
    Object.assign(this, {tag, children: [], attributes: {}, listeners: {}, textContent: "", style: {}, hidden: false});
    Object.assign(this, {clientWidth: 1000, offsetWidth: 100, offsetHeight: 50});
    everything.push(this);
  }
  append(child) { this.children.push(child); }
  replaceChildren() { this.children = []; }
  setAttribute(name, value) {
    if (typeof value === "number" && !Number.isFinite(value)) throw new Error(`${this.tag} ${name} is ${value}`);
    if (String(value).includes("NaN")) throw new Error(`${this.tag} ${name} is ${value}`);
    this.attributes[name] = value;
  }
  addEventListener(name, listener) { (this.listeners[name] ||= []).push(listener); }
  getBoundingClientRect() { return {left: 0, top: 0, width: 100, height: 100}; }
  getContext() {
    return {
      createImageData: (width, height) => ({data: new Uint8ClampedArray(4 * width * height)}),
      putImageData: (image) => { this.image = image; },
    };
  }
}
const byId = {data: new Node("script"), tip: new Node("div"), panels: new Node("main")};
byId.data.textContent = html.slice(begin, html.indexOf("</script>", begin));
const world = {
  document: {
    getElementById: (id) => byId[id],
    createElement: (tag) => new Node(tag),
    createElementNS: (_, tag) => new Node(tag),
  },
  matchMedia: () => ({matches: process.argv[3] === "dark", addEventListener: () => {}}),
  addEventListener: () => {}, innerWidth: 1200, innerHeight: 800, atob, setTimeout, clearTimeout,
};
vm.runInNewContext(script, world);
function hover(node, x, y) {
  for (const listener of node.listeners.mousemove) listener({clientX: x, clientY: y});
  return byId.tip.hidden ? "" : byId.tip.textContent;
}
const sensitive = everything.filter((node) => node.listeners.mousemove);
console.log(JSON.stringify({
  tags: everything.reduce((found, {tag}) => ({...found, [tag]: (found[tag] || 0) + 1}), {}),
  texts: everything.filter((node) => node !== byId.data && node.textContent).map((node) => node.textContent),
  tips: sensitive.map((node) => [hover(node, 1, 1), hover(node, 50, 50), hover(node, 99, 99)]),
  images: everything.filter((node) => node.image).map((node) => ({
    width: node.attributes.width, height: node.attributes.height,
    pixels: process.argv[4] ? Array.from(node.image.data) : [],
    corner: Array.from(node.image.data.slice(0, 4)),
  })),
}));
