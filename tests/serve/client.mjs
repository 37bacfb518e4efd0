// The README's example and its neighbours with Replicate's own JavaScript client.
import fs from "node:fs";
const { default: Replicate } = await import(`${process.env.CLIENT}/index.js`);
const folder = process.env.FOLDER;
const client = (auth) => new Replicate({ auth, baseUrl: `${process.env.URL}/v1` });
const replicate = client(process.env.TOKEN);
const image = fs.readFileSync(`${folder}/photo.png`);
const quick = { image, scale_factor: 4, seed: 1, num_inference_steps: 1, latent_tiled_size: 24 };

const output = await replicate.run("you/seesr", { input: quick });
fs.writeFileSync(`${folder}/photo-x4.png`, Buffer.from(await (await output.blob()).arrayBuffer()));

let prediction = await replicate.predictions.create({
  model: "you/seesr", input: { ...quick, scale_factor: 8, num_inference_steps: 8, latent_tiled_size: 32 },
});
let progress = false;
for (let n = 0; n < 600 && !progress; n++) {
  prediction = await replicate.predictions.get(prediction.id);
  progress = /\d+%\|.*\| \d+\/\d+/.test(prediction.logs);
  await new Promise((resolve) => setTimeout(resolve, 50));
}
await replicate.predictions.cancel(prediction.id);
const canceled = (await replicate.wait(prediction)).status;
const listed = (await replicate.predictions.list()).results.some((found) => found.id === prediction.id);
const status = async (work) => { try { await work(); return 200; } catch (error) { return error.response.status; } };
const wrong = await status(() => client("wrong").predictions.list());
const missing = await status(() => replicate.predictions.get("nothing"));
const file = await replicate.files.create(new Blob([image]), { name: "photo" });
const uploaded = (await replicate.files.get(file.id)).size === image.length;
const streamed = [];
for await (const { event } of replicate.stream("you/seesr", { input: quick })) if (event !== "logs") streamed.push(event);
console.log(JSON.stringify({ progress, canceled, listed, wrong, missing, uploaded, streamed }));
