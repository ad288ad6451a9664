// The dialog for the API key and the admin token.

import { access, setAccess } from "./api.js";
import { html, useEffect, useRef, useState } from "./markup.js";

/** Asks for both; closes after Save, Forget, Cancel or Escape. */
export function AccessDialog({ close }) {
  const dialog = useRef(null);
  const [apiKey, setApiKey] = useState(access.get().apiKey);
  const [adminToken, setAdminToken] = useState(access.get().adminToken);
  useEffect(() => {
    dialog.current.showModal();
  }, []);
  const save = (event) => {
    event.preventDefault();
    setAccess(apiKey.trim(), adminToken.trim());
    close();
  };
  const forget = () => {
    setAccess("", "");
    close();
  };
  return html`<dialog ref=${dialog} onClose=${close} aria-labelledby="access-title">
    <form onSubmit=${save}>
      <h2 id="access-title">Access</h2>
      <label>API key
        <input type="password" autocomplete="off" spellcheck="false" value=${apiKey}
          onInput=${(event) => setApiKey(event.target.value)} aria-describedby="key-help" /></label>
      <p class="help" id="key-help">For chats, where the gateway asks for keys
        (<code>arriero keys add</code>).</p>
      <label>Admin token
        <input type="password" autocomplete="off" spellcheck="false" value=${adminToken}
          onInput=${(event) => setAdminToken(event.target.value)}
          aria-describedby="token-help" /></label>
      <p class="help" id="token-help">For the cluster page. The role view is enough
        (<code>arriero admin-token add</code>).</p>
      <p class="help">Both stay in this tab (sessionStorage) and go to this gateway alone.
        Closing the tab forgets them.</p>
      <div class="buttons">
        <button type="submit" class="primary">Save</button>
        <button type="button" onClick=${close}>Cancel</button>
        <span class="grow"></span>
        <button type="button" class="quiet" onClick=${forget}>Forget both</button>
      </div>
    </form>
  </dialog>`;
}
