// What an accessibility checker looks at, as far as it can be computed; each gives a list of what is wrong.
({
  contrast: () => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = colour => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
    const ground = node => {
        const layers = [];
        for (let each = node; each; each = each.parentElement) layers.push(rgba(getComputedStyle(each).backgroundColor));
        return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
    };
    const light = colour => {
        const [r, g, b] = colour.slice(0, 3).map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const ratio = (one, other) => {
        const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
        return (high + .05) / (low + .05);
    };
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
        if (!node.checkVisibility({ visibilityProperty: true }) || node.closest(".hidden, .skip, noscript, svg")) continue;
        const words = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
        const field = node.matches("input:not([type=radio], [type=range], [type=file], [type=checkbox]), textarea, select");
        if (!words && !field) continue;
        const style = getComputedStyle(node);
        const size = parseFloat(style.fontSize);
        const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
        const under = ground(node);
        const colours = { text: style.color };
        if (field && node.placeholder && !node.value) colours.placeholder = getComputedStyle(node, "::placeholder").color;
        for (const [what, colour] of Object.entries(colours)) {
            const value = ratio(over(rgba(colour), under), under);
            if (value < needed) found.push(`${what} of ${node.tagName}.${node.className} ${node.textContent.slice(0, 30)}: ${value.toFixed(2)}`);
        }
        if (field && ratio(rgba(style.borderTopColor), ground(node.parentElement)) < 3) found.push(`border of ${node.id}`);
    }
    return found;
},

  nameless: () => {
    const labelled = node => node.getAttribute("aria-label")
        || (node.getAttribute("aria-labelledby") ?? "").split(" ").map(id => document.getElementById(id)?.textContent ?? "").join("")
        || [...(node.labels ?? [])].map(label => label.textContent).join("") || (node.matches("input, textarea, select") ? "" : node.textContent) || node.title;
    const found = [];
    for (const node of document.querySelectorAll("a, button, input, textarea, select, summary, [role]:not([role=presentation], [role=status], [role=alert])"))
        if (node.checkVisibility() && !labelled(node)?.trim()) found.push(node.outerHTML.slice(0, 90));
    for (const image of document.querySelectorAll("img")) if (!image.hasAttribute("alt")) found.push(image.outerHTML.slice(0, 90));
    const ids = [...document.querySelectorAll("[id]")].map(node => node.id);
    for (const id of ids) if (ids.filter(other => other === id).length > 1) found.push(`twice: ${id}`);
    for (const attribute of ["aria-describedby", "aria-labelledby", "aria-controls", "for"])
        for (const node of document.querySelectorAll(`[${attribute}]`))
            for (const id of node.getAttribute(attribute).split(" ")) if (!document.getElementById(id)) found.push(`${attribute} of nothing: ${id}`);
    const levels = [...document.querySelectorAll("h1, h2, h3")].filter(each => each.checkVisibility()).map(each => Number(each.tagName[1]));
    if (levels[0] !== 1 || levels.filter(level => level === 1).length !== 1) found.push(`headings: ${levels}`);
    return found;
},

  smallTargets: () => [...document.querySelectorAll("a, button, summary, select, textarea, input:not([type=range])")]
    .filter(node => node.checkVisibility() && !node.closest(".skip") && !node.matches(".skip"))
    .map(node => [node.outerHTML.slice(0, 70), node.getBoundingClientRect()])
    .filter(([, box]) => box.width < 24 || box.height < 24).map(([html]) => html),

  unseenFocus: () => {
                const node = document.activeElement;
                const shown = [node, node.nextElementSibling, node.parentElement].filter(Boolean)
                    .some(each => getComputedStyle(each).outlineStyle !== "none" && parseFloat(getComputedStyle(each).outlineWidth) >= 2);
                return shown || node === document.body ? [] : [node.outerHTML.slice(0, 80)];
            },
})
