// What the app in the tab asks of the page.

export const query = () => location.search;

export const fragment = () => location.hash.slice(1);

export const link = (fragment) => `${location.href.split("#")[0]}#${fragment}`;

// Whether the GPU is a program that runs on the CPU.
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

export function pick(kinds, what) {
    return new Promise((resolve) => {
        const input = document.createElement("input");
        input.type = "file";
        input.accept = kinds;
        input.multiple = what === "files";
        input.webkitdirectory = what === "folder";
        // Files of the folders in a folder are no model's.
        const direct = (file) => file.webkitRelativePath.split("/").length <= 2;
        input.onchange = () => resolve(Array.from(input.files).filter(direct));
        input.oncancel = () => resolve([]);
        input.click();
    });
}

export const folder = (file) => file.webkitRelativePath.split("/")[0];

export async function slice(file, start, end) {
    try {
        return new Uint8Array(await file.slice(start, end).arrayBuffer());
    } catch {
        throw new Error("the browser does not read it any more: it was changed or removed after it was chosen");
    }
}

// How long a server may send nothing, in milliseconds.
const SILENCE = 30000;

// A range of a file of a server. The file's size and version are known from an earlier range; without them it may not be there.
export async function part(url, start, end, total, version) {
    const stop = new AbortController();
    let timer;
    const wait = () => {
        clearTimeout(timer);
        timer = setTimeout(() => stop.abort(new Error("the server has sent nothing for 30 seconds")), SILENCE);
    };
    try {
        wait();
        const response = await ask(url, start, end, stop.signal);
        if (response.status === 404 && total === undefined) {
            stop.abort();
            return undefined;
        }
        const found = { ...size(response, end), version: response.headers.get("ETag") ?? response.headers.get("Last-Modified") ?? undefined };
        if (total !== undefined && (found.total !== total || found.version !== version)) {
            throw new Error("the file on the server has changed since it was opened");
        }
        found.bytes = await body(response, Math.min(end, found.total ?? end) - start, wait);
        found.total ??= found.bytes.length;
        return found;
    } catch (error) {
        stop.abort();
        throw error;
    } finally {
        clearTimeout(timer);
    }
}

async function ask(url, start, end, signal) {
    try {
        // What is read once is not kept: a model is larger than a browser's cache.
        return await fetch(url, { headers: { Range: `bytes=${start}-${end - 1}` }, cache: "no-store", signal });
    } catch (error) {
        throw error instanceof TypeError
            ? new Error("the server cannot be reached, or does not let pages of other addresses read the file (CORS)")
            : error;
    }
}

// The size of the file by the answer. It may be unknown only of a small file that comes whole.
function size(response, end) {
    if (response.status === 206) {
        const total = Number(response.headers.get("Content-Range")?.split("/")[1]);
        if (Number.isSafeInteger(total)) return { total };
        throw new Error("the server does not let pages read the file's size: it is to expose the header Content-Range (CORS)");
    }
    if (!response.ok) throw new Error(`the server answers with status ${response.status}`);
    const length = response.headers.get("Content-Length");
    if (length === null || Number(length) <= end) return {};
    throw new Error("the server sends the file whole and no parts of it (HTTP ranges); a page does not load a model whole");
}

async function body(response, most, wait) {
    const [bytes, reader] = [new Uint8Array(most), response.body.getReader()];
    let length = 0;
    for (;;) {
        let piece;
        try {
            piece = await reader.read();
        } catch (error) {
            throw error instanceof TypeError ? new Error(`the connection was cut after ${length} of ${most} bytes`) : error;
        }
        if (piece.done) return bytes.subarray(0, length);
        wait();
        if (length + piece.value.length > most) throw new Error(`the server sends more than the ${most} bytes that were asked for`);
        bytes.set(piece.value, length);
        length += piece.value.length;
    }
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

export function title(text) {
    document.title = text;
}

export function refuse(sentence) {
    document.body.dataset.state = "refused";
    say(sentence);
}

export function begin() {
    say("");
    document.body.dataset.state = "shown";
}
