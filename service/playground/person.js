// Who somebody is, and the memory that belongs to the name.

const LONGEST = 128;

/** The id of a person's memory, which a program may write in an address: "Zoë Ott" has "zoe-ott". */
export function memoryOf(name) {
  const plain = name.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  const id = plain.replace(/[^a-z0-9]/gu, (sign) => (/[\p{L}\p{N}]/u.test(sign) ? `.${sign.codePointAt(0).toString(16)}` : "-"));
  return id
    .replace(/-+/g, "-")
    .replace(/^[-.]+|-+$/g, "")
    .slice(0, LONGEST);
}
