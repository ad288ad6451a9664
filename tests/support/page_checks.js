// Faults of a page for eyes and for screen readers: text with too little contrast, controls without
// a name, pages that are wider than the window. Evaluated in the page by test_console_browser.py.
() => {
  const LEAST = 4.5;
  const LEAST_LARGE = 3;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = context.getImageData(0, 0, 1, 1).data;
    return { parts: [red, green, blue], alpha: alpha / 255 };
  };
  const over = (top, below) =>
    below.map((part, index) => top.parts[index] * top.alpha + part * (1 - top.alpha));
  const background = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const layer = rgba(getComputedStyle(at).backgroundColor);
      if (layer.alpha > 0) layers.unshift(layer);
      if (layer.alpha === 1) break;
    }
    return layers.reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const luminance = (parts) => {
    const [red, green, blue] = parts.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const visible = (element) => {
    const box = element.getBoundingClientRect();
    return box.width > 1 && box.height > 1 && element.checkVisibility({ visibilityProperty: true });
  };
  const shown = (element) => `${element.tagName.toLowerCase()}.${element.className}`;

  const faults = [];
  let numTexts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !visible(element) || element.closest(":disabled")) continue;
    numTexts += 1;
    const style = getComputedStyle(element);
    const below = background(element);
    const ratio = contrast(over(rgba(style.color), below), below);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? LEAST_LARGE : LEAST)) {
      faults.push(`contrast ${ratio.toFixed(2)}: ${shown(element)} "${node.data.trim().slice(0, 30)}"`);
    }
  }
  const name = (element) =>
    element.getAttribute("aria-label") || element.innerText?.trim() ||
    [...(element.labels ?? [])].map((label) => label.textContent.trim()).join(" ");
  for (const element of document.querySelectorAll("a, button, input, select, textarea, summary, [tabindex='0']")) {
    if (visible(element) && !name(element)) faults.push(`no name: ${shown(element)}`);
  }
  for (const image of document.querySelectorAll("img")) {
    if (!image.hasAttribute("alt")) faults.push(`no alternative text: ${shown(image)}`);
  }
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) {
    faults.push(`the page is ${root.scrollWidth} px wide in a window of ${root.clientWidth} px`);
  }
  if (!root.lang || !document.title) faults.push("no language or no title");
  return { faults, numTexts };
}
