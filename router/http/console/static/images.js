// Images that the user gives: read as data URLs, checked against the limits of the gateway.

export const MAX_IMAGES = 8;
const MAX_BYTES = 20_000_000;
const KINDS = ["image/jpeg", "image/png", "image/webp"];
export const ACCEPTED = KINDS.join(",");

/**
 * Read files as images.
 * @returns {Promise<{images: {name: string, url: string}[], problems: string[]}>}
 */
export async function readImages(files, numBefore) {
  const images = [];
  const problems = [];
  for (const file of files) {
    if (!KINDS.includes(file.type)) {
      problems.push(`${file.name || "The file"} is no JPEG, PNG or WebP image.`);
    } else if (file.size > MAX_BYTES) {
      problems.push(`${file.name} has more than ${MAX_BYTES / 1e6} MB, the limit.`);
    } else if (numBefore + images.length >= MAX_IMAGES) {
      problems.push(`A conversation takes ${MAX_IMAGES} images; ${file.name} was left out.`);
    } else {
      images.push({ name: file.name || "pasted image", url: await dataUrl(file) });
    }
  }
  return { images, problems };
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** The files of a drop or a paste. */
export const filesOf = (transfer) => [...(transfer?.files ?? [])];
