// The server's routes. A key, if the server wants one, is kept only in this page.

let key = "";
export const useKey = (value) => { key = value; };

function headers() {
  const found = { "content-type": "application/json" };
  return key ? { ...found, authorization: `Bearer ${key}` } : found;
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `the server answered ${response.status}`);
  error.status = response.status;
  throw error;
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  return (await checked(await fetch(path, options))).json();
}

// Events of a stream, one object each; an error in the stream is thrown.
export async function* events(path, body, signal) {
  const options = body === null ? {} : { method: "POST", body: JSON.stringify(body) };
  const response = await checked(await fetch(path, { ...options, headers: headers(), signal }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return; // a stream that was cut off has thrown
    waiting += value;
    const parts = waiting.split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const text = part.slice(6);
      if (text === "[DONE]") continue;
      const found = JSON.parse(text);
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}
