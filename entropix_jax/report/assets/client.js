// The server's API: requests with a key, answers as JSON or as a stream of events, errors as one sentence.

const KEY = "entropix key";

/** An error with a sentence for people; status 0: the server cannot be reached, or the stream broke off. */
export class Refused extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const GONE = "The server cannot be reached; is it still running?";

async function refusal(response) {
  let said = null;
  try { said = (await response.json()).error; } catch { /* not the server's own answer */ }
  return new Refused(said?.message ?? `The server answered ${response.status}.`, response.status, said?.code);
}

async function ask(path, body, signal) {
  const key = sessionStorage.getItem(KEY), headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? { headers, signal } : { method: "POST", body: JSON.stringify(body), headers: { ...headers, "content-type": "application/json" }, signal };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(GONE, 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** The answer of a route; a body makes it a POST. */
export async function call(path, body, signal) {
  return (await ask(path, body, signal)).json();
}

/** The objects of a stream of events, those that came together in one list. Raises Refused if it breaks off. */
export async function* stream(path, body, signal) {
  const reader = (await ask(path, body, signal)).body.getReader(), decoder = new TextDecoder();
  let rest = "", done = false;
  try {
    while (!done) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        throw error.name === "AbortError" ? error : new Refused("The connection was lost.", 0);
      }
      if (piece.done) throw new Refused("The connection was lost.", 0);
      const events = (rest + decoder.decode(piece.value, { stream: true })).split("\n\n");
      rest = events.pop();
      const found = [];
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (data === "[DONE]") done = true;
        else if (data) found.push(JSON.parse(data));
      }
      if (found.length) yield found;
      const failed = found.find(({ error }) => error);
      if (failed) throw new Refused(failed.error.message, failed.error.code === "engine_dead" ? 503 : 500, failed.error.code);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
