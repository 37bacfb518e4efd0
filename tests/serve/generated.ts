// Posts an image, reads the result and an error by its code, with the client of openapi-typescript and openapi-fetch.
import fs from "node:fs";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

const { URL: baseUrl, TOKEN, PHOTO } = process.env as Record<string, string>;
const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${TOKEN}` } });
const image = `data:image/png;base64,${fs.readFileSync(PHOTO).toString("base64")}`;

const whole = await client.POST("/upscale", { body: { image, scale_factor: 2, seed: 1 }, parseAs: "arrayBuffer" });
const bytes: ArrayBuffer = whole.data as unknown as ArrayBuffer;
const same = Buffer.from(bytes).equals(fs.readFileSync(PHOTO));

const form = new FormData();
form.append("image", new Blob([fs.readFileSync(PHOTO)]), "photo.png");
form.append("wait", "0");
const queued = await client.POST("/upscale", { body: form as never, bodySerializer: (body) => body as never });
let job = queued.data as components["schemas"]["Job"];
while (job.status === "starting" || job.status === "processing") {
  const { data } = await client.GET("/jobs/{id}", { params: { path: { id: job.id } } });
  job = data!;
}
const result = await client.GET("/jobs/{id}/result", { params: { path: { id: job.id } }, parseAs: "arrayBuffer" });

const wrong = await client.POST("/upscale", { body: { image, scale_factor: 99 } });
const code: components["schemas"]["Error"]["code"] | undefined = wrong.error?.code;
const stranger = createClient<paths>({ baseUrl, headers: { Authorization: "Bearer wrong" } });
const unauthorized = (await stranger.GET("/jobs/{id}", { params: { path: { id: job.id } } })).error?.code;
const prediction = await client.POST("/v1/predictions", {
  body: { version: "you/seesr", input: { image, seed: 1 } }, headers: { Prefer: "wait" },
});
console.log(JSON.stringify({
  same, status: job.status, seed: typeof job.settings.seed, result: result.response.status,
  code, field: wrong.error?.field, unauthorized, prediction: prediction.data?.status,
}));
