// A picture over gRPC from Node, with a client made from the protos, and one that is cancelled.
//
//   bagel serve
//   npm ci && node client.js 127.0.0.1:50051 pictures
import { mkdirSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));
const LARGEST = { "grpc.max_receive_message_length": 64 * 2 ** 20 };

const definition = loader.loadSync("bagel/v1/gateway.proto", { includeDirs: [PROTOS], longs: String, enums: String, oneofs: true });
const { GatewayService } = grpc.loadPackageDefinition(definition).bagel.v1;

const [address = "127.0.0.1:50051", folder = "pictures"] = process.argv.slice(2);
const client = new GatewayService(address, grpc.credentials.createInsecure(), LARGEST);
const picture = (text, steps) => ({ request: { modality: "MODALITY_TEXT2IMG", prompt: [{ text: { text } }], seed: 7, image: { steps } } });

client.DescribeModel({}, async (error, told) => {
  if (error) throw error;
  console.log(`model: ${told.model.name}, pipeline ${told.pipeline}`);
  mkdirSync(folder, { recursive: true });
  await draw();
  await giveUp();
  client.close();
});

async function draw() {
  for await (const response of client.Generate(picture("a large red circle", 24), { deadline: Date.now() + 120_000 })) {
    if (response.event === "step") console.log(`step ${response.step.step} of ${response.step.steps}`);
    if (response.event === "picture") writeFileSync(`${folder}/node.png`, response.picture.data);
    if (response.event === "finished") console.log(`finished: ${response.finished.usage.steps} steps`);
  }
}

// Cancelling stops the work in every service within a step.
async function giveUp() {
  const call = client.Generate(picture("a green triangle", 500));
  try {
    for await (const response of call) if (response.event === "step" && response.step.step === 3) call.cancel();
  } catch (error) {
    if (error.code !== grpc.status.CANCELLED) throw error;
    console.log("given up after step 3");
  }
}
