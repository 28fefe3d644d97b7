// What the app in the tab asks of the page.

export const query = () => location.search;

export const fragment = () => location.hash.slice(1);

export const link = (fragment) => `${location.href.split("#")[0]}#${fragment}`;

// Whether the GPU is a program that runs on the processor.
export async function software() {
    const { info } = await navigator.gpu.requestAdapter();
    return info.isFallbackAdapter || info.architecture === "swiftshader";
}

// A browser may forbid storage: reading it throws then.
function storage() {
    try {
        return localStorage;
    } catch {
        return undefined;
    }
}

export const stored = () => Object.keys(storage() ?? {});

export const load = (key) => storage()?.getItem(key) ?? undefined;

export function store(key, text) {
    const kept = storage();
    if (kept === undefined) {
        throw new Error("this browser does not let the page keep anything");
    }
    kept.setItem(key, text);
}

export const forget = (key) => storage()?.removeItem(key);

export function pick(kinds) {
    return new Promise((resolve) => {
        const input = document.createElement("input");
        input.type = "file";
        input.accept = kinds;
        input.onchange = () => resolve(input.files[0]);
        input.oncancel = () => resolve(undefined);
        input.click();
    });
}

export const bytes = async (file) => new Uint8Array(await file.arrayBuffer());

export function download(name, bytes) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes]));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
}

export function say(sentence) {
    document.getElementById("state").textContent = sentence;
}

export function refuse(sentence) {
    document.body.dataset.state = "refused";
    say(sentence);
}

export function begin() {
    say("");
    document.body.dataset.state = "shown";
}
