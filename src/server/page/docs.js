// Shows the server's OpenAPI document: each route, and the fields of its body.

const routes = document.getElementById("routes");

const element = (name, text, ...children) => {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
};

/** What a schema is called: its type, or the name that it refers to. */
const called = (schema) => {
  if (!schema || schema === true) return "any";
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return several.map(called).filter((name) => name !== "null").join(" | ");
  if (schema.type === "array") return `list of ${called(schema.items)}`;
  const types = [schema.type].flat().filter((type) => type && type !== "null");
  return types.join(" | ") || "any";
};

const fields = (schema, open) => {
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => {
    const needed = schema.required?.includes(name) ? ", needed" : "";
    return element("p", "", element("code", name), ` (${called(field)}${needed}) ${field.description ?? ""}`);
  });
  return rows.length || open ? rows : [element("p", called(schema), "")];
};

const show = (api) => {
  const resolve = (schema) => (schema.$ref ? api.components.schemas[called(schema)] : schema);
  for (const [path, operations] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      const head = element("summary", `${method.toUpperCase()} ${path}: ${operation.summary}`);
      const body = operation.requestBody?.content["application/json"].schema;
      const parts = (body?.allOf ?? []).flatMap((part) => fields(resolve(part), true));
      const key = operation.security ? [element("p", "Asks for the API key, where the server has one.")] : [];
      routes.append(element("details", "", head, ...key, ...parts));
    }
  }
  routes.append(element("h1", "Schemas"));
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    const forms = (schema.oneOf ?? schema.anyOf ?? [schema]).map(resolve);
    const about = schema.description ? [element("p", schema.description)] : [];
    routes.append(element("details", "", element("summary", name), ...about, ...forms.flatMap((form) => fields(form, false))));
  }
};

fetch("openapi.json")
  .then((answer) => answer.json())
  .then(show)
  .catch((error) => routes.append(element("p", `The document did not come: ${error}`)));
